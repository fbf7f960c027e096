"""Optimizer runs with names: one list for the tests and the bench."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

from fastllm.optim.adam import Adam, AdamW
from fastllm.optim.base import Fused
from fastllm.optim.lion import Lion
from fastllm.optim.sgd import SGD

Shapes = tuple[tuple[int, ...], ...]

# one element, none, a scalar, remainders of every vector, more than a block, more than a piece
SMALL: Shapes = ((300, 100), (7,), (), (0, 3), (33, 65), (129,))
LARGE: Shapes = ((4096, 4096),) * 4


@dataclass(frozen=True)
class Case:
    """One optimizer with its options over parameters of some shapes and dtype.

    `stock` builds torch's best on the same parameters, or is None where torch has no such thing.
    Tags: "quick" (part of every run), "bench" (worth timing).
    """

    name: str
    make: type[Fused]
    stock: Callable[..., torch.optim.Optimizer] | None
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # options that torch does not have
    shapes: Shapes = SMALL
    dtype: torch.dtype = torch.float32
    tags: frozenset[str] = frozenset(("quick",))

    def params(self, seed: int = 0) -> list[Parameter]:
        """New parameters, the same for a seed, with gradients of a hundredth of their size."""
        g = torch.Generator().manual_seed(seed)
        made = [Parameter(torch.randn(s, generator=g).to(self.dtype)) for s in self.shapes]
        for p in made:
            p.grad = (torch.randn(p.shape, generator=g) * 1e-2).to(self.dtype)
        return made


def _quick() -> list[Case]:
    adam: list[dict[str, Any]] = [
        {},
        {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        {"amsgrad": True, "weight_decay": 0.3},
        {"maximize": True},
        {"amsgrad": True, "maximize": True, "lr": 0.1, "eps": 1e-3},
    ]
    sgd: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ]
    found = [
        Case(f"{cls.__name__}-{i}", cls, getattr(torch.optim, cls.__name__), options)
        for cls, settings in ((AdamW, adam), (Adam, adam), (SGD, sgd))
        for i, options in enumerate(settings)
    ]
    lions: list[dict[str, Any]] = [
        {},
        {"lr": 1e-2, "betas": (0.8, 0.9), "weight_decay": 0.1},
        {"maximize": True},
    ]
    return found + [Case(f"Lion-{i}", Lion, None, options) for i, options in enumerate(lions)]


def _bench() -> list[Case]:
    many = (("67M", LARGE), ("500x1000", ((1000,),) * 500), ("300x20k", ((20000,),) * 300))
    fused = {"fused": True}
    tags = frozenset(("bench",))
    found = [
        Case(f"AdamW-{name}", AdamW, torch.optim.AdamW, fused, {}, shapes, tags=tags)
        for name, shapes in many
    ]
    bf16 = torch.bfloat16
    for kept in ("int8", "fp8", "bf16"):
        extra = {"state_dtype": kept}
        found.append(
            Case(f"AdamW-67M-{kept}", AdamW, torch.optim.AdamW, fused, extra, LARGE, tags=tags)
        )
    found.append(
        Case("AdamW-67M-bf16-params", AdamW, torch.optim.AdamW, fused, {}, LARGE, bf16, tags)
    )
    sgd = {"lr": 0.1, "momentum": 0.9, "fused": True}
    found.append(Case("SGD-67M", SGD, torch.optim.SGD, sgd, {}, LARGE, tags=tags))
    return found


CASES: tuple[Case, ...] = (*_quick(), *_bench())
