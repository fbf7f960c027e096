"""Third part: the same small Llama trained leanly, low precision and 8-bit states, against float32.

    python -m fastllm.cli.demo.lean --out curves.png

Stock is float32 with torch's AdamW. Lean is the swapped model, autocast (bfloat16, or float16 with
dynamic loss scaling), gradients accumulated over micro-batches, clipping in the step and AdamW with
8-bit states. Both see the same batches.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastllm.cli.console import write_atomically
from fastllm.cli.demo.llama import QUICK, Size, batch_of, build
from fastllm.optim import AdamW, GradScaler
from fastllm.swap.engine import swap_model as swap

STOCK, LEAN = "float32", "lean"
OPTIONS: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class LeanResult:
    """Losses by step, bytes of optimizer states, seconds a step; skipped steps of the lean one."""

    losses: dict[str, list[float]]
    state_bytes: dict[str, int]
    seconds: dict[str, float]
    skipped: int

    def last(self, name: str, steps: int = 10) -> float:
        """The mean loss of the last steps."""
        return sum(self.losses[name][-steps:]) / len(self.losses[name][-steps:])


class Run:
    """One model and its way to train."""

    def __init__(
        self, size: Size, device: str, seed: int, lean: bool, dtype: torch.dtype, parts: int = 2
    ) -> None:
        self.size, self.device, self.seed, self.dtype = size, device, seed, dtype
        self.lean, self.parts = lean, parts if lean else 1
        self.model = build(size, seed).to(device).train()
        if lean:
            swap(self.model)
        params = self.model.parameters()
        scaled = lean and dtype == torch.float16
        self.scaler = GradScaler(torch.device(device).type, enabled=scaled)
        self.optimizer: torch.optim.Optimizer
        if lean:
            self.optimizer = AdamW(params, **OPTIONS, state_dtype="int8", max_grad_norm=1.0)
        else:
            self.optimizer = torch.optim.AdamW(params, **OPTIONS)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.skipped = 0

    def step(self) -> None:
        """One optimizer step on the next batch, in one part or several."""
        ids = batch_of(self.size, len(self.losses) + 10_000 * self.seed, self.device)
        start, total = time.perf_counter(), 0.0
        for part in ids.chunk(self.parts):
            with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.lean):
                loss = self.model(input_ids=part, labels=part, use_cache=False).loss
            loss = loss * (len(part) / len(ids))
            self.scaler.scale(loss).backward()
            total += loss.item()
        if not self.lean:  # the lean one clips in its step
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.scaler.get_scale() < before
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        self.seconds += time.perf_counter() - start

    def state_bytes(self) -> int:
        """What the optimizer keeps."""
        states = self.optimizer.state.values()
        return sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor))


def compare(
    size: Size = QUICK,
    steps: int = 60,
    seconds: float = 1e9,
    device: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    tick: Callable[[float], Any] | None = None,
) -> LeanResult:
    """Trains both on the same batches in turns, `steps` steps each or until `seconds` are over."""
    runs = {n: Run(size, device, seed, n == LEAN, dtype) for n in (STOCK, LEAN)}
    begin = time.perf_counter()
    for number in range(steps):
        spent = (time.perf_counter() - begin) / seconds
        if spent >= 1 and number >= 10:
            break
        if tick:
            tick(min(max(spent, number / steps), 1.0))
        for run in runs.values():
            run.step()
    return LeanResult(
        losses={n: r.losses for n, r in runs.items()},
        state_bytes={n: r.state_bytes() for n, r in runs.items()},
        seconds={n: r.seconds / len(r.losses) for n, r in runs.items()},
        skipped=runs[LEAN].skipped,
    )


def rows(found: LeanResult) -> list[tuple[str, str, str, str]]:
    """The figures as text: what, float32, lean, lean / float32."""
    kib = {n: b / 2**10 for n, b in found.state_bytes.items()}
    loss = {n: found.last(n) for n in found.losses}
    made = []
    for name, form, values in (
        ("lean training, loss (last 10 steps)", "{:.4f}", loss),
        ("lean training, optimizer states, KiB", "{:.0f}", kib),
        ("lean training, ms a step", "{:.0f}", {n: s * 1e3 for n, s in found.seconds.items()}),
    ):
        ratio = f"{values[LEAN] / values[STOCK]:.2f}x" if values[STOCK] else ""
        made.append((name, form.format(values[STOCK]), form.format(values[LEAN]), ratio))
    return made


def draw(found: LeanResult) -> bytes:
    """Loss curves and memory side by side, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, color, width in ((STOCK, "#9aa3ad", 4), (LEAN, "#0b7a75", 1.5)):
        steps = range(1, len(found.losses[name]) + 1)
        left.plot(steps, found.losses[name], color=color, lw=width, label=name)
        bars = right.bar([name], [found.state_bytes[name] / 2**20], color=color, width=0.55)
        right.bar_label(bars, fmt="%.2f", padding=3)
    left.set(title="training loss", xlabel="step")
    left.legend()
    right.set(title="optimizer states, MiB")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    pyplot.close(figure)
    return buffer.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints the figures and writes the picture where --out says."""
    parser = argparse.ArgumentParser(description="float32 against lean training")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--fp16", action="store_true", help="float16 and dynamic loss scaling")
    parser.add_argument("--out", type=Path, help="the picture, a PNG")
    args = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    size = QUICK if args.quick else Size()
    for seed in range(args.seeds):
        found = compare(size, args.steps, device=device, seed=seed, dtype=dtype)
        print(f"seed {seed}, {found.skipped} steps skipped")
        for what, stock, lean, ratio in rows(found):
            print(f"  {what:40} {stock:>10} {lean:>10} {ratio:>7}")
        if args.out and seed == 0:
            print(f"wrote {write_atomically(args.out, draw(found))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
