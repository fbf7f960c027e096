"""Named inputs of an op: one list serves the tests, the bench, `fastllm check` and the tuner."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The least that a call must do: bytes that have to move, floating point operations."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True, eq=False)
class Case:
    """One set of arguments; `build(generator)` makes them on the CPU, the same for a seed.

    Tags: "quick" (small, part of every run), "bench" (worth timing), "adversarial" (inf, NaN, 0).
    """

    name: str
    dtype: torch.dtype
    build: Callable[[torch.Generator], tuple[Any, ...]]
    tags: frozenset[str] = frozenset()

    def args(self, device: str | torch.device = "cpu", seed: int = 0) -> tuple[Any, ...]:
        """The op's resolved positional arguments on `device`."""
        made = self.build(torch.Generator().manual_seed(seed))
        return tuple(a.to(device) if isinstance(a, Tensor) else a for a in made)
