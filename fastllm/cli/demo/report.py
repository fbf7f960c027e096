"""What the demo found, for the terminal and as Markdown."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from fastllm.cli.console import table
from fastllm.cli.demo import lean
from fastllm.cli.demo import quantized as low_bit
from fastllm.cli.demo.distil import DistilResult
from fastllm.cli.demo.encoder import STOCK, SWAPPED, EncoderResult
from fastllm.cli.demo.llama import LlamaResult
from fastllm.cli.demo.memory import Memory
from fastllm.core.device import cpu_info
from fastllm.core.measure import Ratio

HEAD = ("", STOCK, SWAPPED, f"{SWAPPED} / {STOCK}")


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    encoder: EncoderResult
    llama: LlamaResult
    distil: DistilResult
    memory: dict[str, Memory]
    no_memory: str | None
    device: str
    seconds: float
    training: lean.LeanResult | None = None
    quantized: low_bit.QuantizedResult | None = None


def summary(found: Findings) -> Table:
    """The figures as a table."""
    made = table("Stock against swapped", *HEAD, right=(1, 2, 3))
    for row in rows(found):
        made.add_row(*row)
    return made


def rows(found: Findings) -> list[tuple[str, str, str, str]]:
    """The figures as text: what, stock, swapped, ratio with its quartiles."""
    encoder, llama = found.encoder, found.llama
    cosines = encoder.cosines
    mean = sum(cosines) / len(cosines)
    distil = found.distil
    last, taught = _last(llama.losses), _last(distil.losses)
    made = [
        ("encoder, sentences/s", *_pair(encoder.speed, "{:.0f}"), _ratio(encoder.speedup)),
        ("encoder, cosine mean / min", "", f"{mean:.7f} / {min(cosines):.7f}", ""),
        ("Llama, training tokens/s", *_pair(llama.speed, "{:.0f}"), _ratio(llama.speedup)),
        ("Llama, loss (last 5 steps)", f"{last[0]:.4f}", f"{last[1]:.4f}", ""),
        ("distillation, tokens/s", *_pair(distil.speed, "{:.0f}"), _ratio(distil.speedup)),
        ("distillation, loss (last 5 steps)", f"{taught[0]:.4f}", f"{taught[1]:.4f}", ""),
    ]
    if found.memory:
        peak = {name: m.peak / 2**20 for name, m in found.memory.items()}
        made.append(("Llama, peak memory, MiB", *_pair(peak, "{:.0f}"), _quotient(peak)))
        added = {name: (m.peak - m.before) / 2**20 for name, m in found.memory.items()}
        made.append(("  of it, added by training", *_pair(added, "{:.0f}"), _quotient(added)))
    made += lean.rows(found.training) if found.training else []
    return made + (low_bit.rows(found.quantized) if found.quantized else [])


def _last(losses: dict[str, list[float]]) -> list[float]:
    """Means over the last five steps."""
    return [sum(losses[n][-5:]) / len(losses[n][-5:]) for n in (STOCK, SWAPPED)]


def notes(found: Findings) -> list[str]:
    """What the figures mean, in a line each."""
    encoder, llama = found.encoder, found.llama
    back = "gave the original back bit for bit" if encoder.restored else "DID NOT restore the model"
    lines = [
        f"encoder: all-MiniLM-L6-v2, {encoder.sentences} sentences in batches of similar length, "
        f"{encoder.passes} passes in turns; swapped with unpad=True: {encoder.report.summary}; "
        f"restore() {back}",
        f"Llama: {llama.parameters / 1e6:.1f} million parameters, {llama.size.tokens} bytes of "
        f"text a step, {len(llama.losses[STOCK])} steps in turns; {llama.report.summary}",
        f"distillation: the trained Llama teaches one of {found.distil.parameters / 1e6:.1f} "
        f"million parameters, {len(found.distil.losses[STOCK])} steps in turns; stock: F.kl_div "
        "and F.cross_entropy of both logits; swapped: linear_distillation_loss of hidden states",
        "ratios are medians of quotients within a turn (for encoders, a pass), quartiles in "
        "brackets; most of the time goes into matrix products, where torch's own code runs "
        "wherever it is as fast",
    ]
    if found.training:
        lines.append(
            "lean training: left float32 with torch's AdamW, right bfloat16 autocast, two "
            "micro-batches a step, clipping in the step, AdamW with 8-bit states; more with "
            "python -m fastllm.cli.demo.lean"
        )
    if found.quantized:
        lines.append(low_bit.note(found.quantized))
    if found.no_memory:
        lines.append(f"memory was not measured: {found.no_memory}")
    elif torch.device(found.device).type == "cpu":
        lines.append("memory: peak resident memory of a process that trains only this variant")
    else:
        lines.append("memory: what torch's allocator had allocated at most")
    return lines


def markdown(found: Findings, picture: str) -> str:
    """The report as a page beside its picture."""
    parts = ["# fastllm demo: stock against swapped", "", f"{machine(found)}.", ""]
    parts += [f"![Figures of this run]({picture})", ""]
    parts += ["| " + " | ".join(HEAD) + " |", "|---|---:|---:|---:|"]
    parts += ["| " + " | ".join(row) + " |" for row in rows(found)]
    parts += ["", *(f"- {note}" for note in notes(found)), ""]
    for name, report in (("encoder", found.encoder.report), ("Llama", found.llama.report)):
        parts += [f"## What was swapped in the {name}, and what was not", ""]
        parts += ["```", str(report).strip(), "```", ""]
    return "\n".join(parts)


def machine(found: Findings) -> str:
    """Where the figures come from."""
    cpu = cpu_info()
    where = f"{cpu.name}, {cpu.isa}, {cpu.threads} threads"
    if torch.device(found.device).type == "cuda":
        where = f"{torch.cuda.get_device_name(found.device)}, {where}"
    return f"{where}; torch {torch.__version__}, Python {platform.python_version()}"


def _pair(values: dict[str, Any], form: str) -> tuple[str, str]:
    return form.format(values[STOCK]), form.format(values[SWAPPED])


def _ratio(x: Ratio) -> str:
    return f"{x.value:.2f}x ({x.low:.2f}-{x.high:.2f})"


def _quotient(values: dict[str, float]) -> str:
    return f"{values[SWAPPED] / values[STOCK]:.2f}x" if values[STOCK] > 0 else ""
