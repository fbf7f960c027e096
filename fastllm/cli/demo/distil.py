"""Third part: the trained Llama teaches one of half its size, stock against ours."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import functional as fast
from fastllm.cli.demo.encoder import STOCK, SWAPPED
from fastllm.cli.demo.llama import WARM_UP, Size, batch_of, build
from fastllm.core.measure import Measurement, Ratio
from fastllm.swap.engine import swap_model as swap

TEMPERATURE, ALPHA = 2.0, 0.5
_FIRST = 100_000  # the first step's batch: none that the teacher was trained on


@dataclass(frozen=True)
class DistilResult:
    """Losses by step, tokens/s, and what the student learned from."""

    size: Size
    parameters: int
    losses: dict[str, list[float]]
    speed: dict[str, float]
    speedup: Ratio


def half(size: Size) -> Size:
    """A student's size: half as wide and half as deep."""
    return replace(
        size,
        hidden=size.hidden // 2,
        layers=max(1, size.layers // 2),
        intermediate=size.intermediate // 2,
        heads=max(1, size.heads // 2),
        key_heads=max(1, size.key_heads // 2),
    )


class Student:
    """One student, the teacher it listens to and how its loss is computed."""

    def __init__(self, size: Size, teacher: Any, device: str, ours: bool) -> None:
        self.size, self.teacher, self.device, self.ours = size, teacher, device, ours
        self.model = build(size, seed=1).to(device).train()
        if ours:
            swap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimizer step on the next batch, timed."""
        ids = batch_of(self.size, _FIRST + len(self.losses), self.device)
        start = time.perf_counter()
        loss = self.fused(ids) if self.ours else self.plain(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def fused(self, ids: Tensor) -> Tensor:
        """From hidden states: nobody's logits exist as a whole."""
        taught = self.hidden(self.teacher, ids, torch.no_grad())
        learned = self.hidden(self.model, ids, torch.enable_grad())
        return fast.linear_distillation_loss(
            learned, self.model.lm_head.weight, taught, self.teacher.lm_head.weight, ids[:, 1:],
            temperature=TEMPERATURE, alpha=ALPHA,
        )  # fmt: skip

    @staticmethod
    def hidden(model: Any, ids: Tensor, mode: Any) -> Tensor:
        """The states that predict the next tokens."""
        with mode:
            return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]

    def plain(self, ids: Tensor) -> Tensor:
        """As one writes it with torch."""
        with torch.no_grad():
            taught = self.teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        learned = self.model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        log_p, log_q = (F.log_softmax(v / TEMPERATURE, -1) for v in (learned, taught))
        soft = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(learned, ids[:, 1:].flatten())
        return ALPHA * TEMPERATURE**2 * soft + (1 - ALPHA) * hard


def compare(
    size: Size,
    teachers: dict[str, Any],
    steps: int = 60,
    seconds: float = 10.0,
    device: str = "cpu",
    tick: Callable[[float], Any] | None = None,
) -> DistilResult:
    """Trains both students on the same batches in turns. `size` and `teachers` are a Llama's."""
    small = half(size)
    students = {
        name: Student(small, teachers[name].eval(), device, name == SWAPPED)
        for name in (STOCK, SWAPPED)
    }
    begin = time.perf_counter()
    for number in range(steps):
        spent = (time.perf_counter() - begin) / seconds
        if tick:
            tick(min(max(spent, number / steps), 1.0))
        if spent >= 1 and number >= WARM_UP + 5:
            break
        order = list(students.values())
        for student in order if number % 2 else reversed(order):
            student.step()
    if tick:
        tick(1.0)
    samples = {name: s.seconds[WARM_UP:] or s.seconds for name, s in students.items()}
    found = Measurement(samples, sets=[0] * len(samples[STOCK]))
    return DistilResult(
        size=small,
        parameters=sum(p.numel() for p in students[STOCK].model.parameters()),
        losses={name: s.losses for name, s in students.items()},
        speed={name: small.tokens / found.seconds(name) for name in samples},
        speedup=found.speedup(SWAPPED, over=STOCK),
    )
