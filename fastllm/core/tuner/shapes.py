"""An op's arguments in sizes that somebody names: `fastllm tune --shapes 2048x768`."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.core.op import Op
from fastllm.core.tuner import routes
from fastllm.core.tuner.jobs import Sighting

Sizes = dict[int, int]


def parse(text: str) -> list[int]:
    """2048x768 as numbers; ValueError when it is none."""
    parts = text.lower().split("x")
    if not all(p.isdecimal() and int(p) for p in parts):
        raise ValueError(f"shapes: expected sizes such as 2048x768, found {text!r}")
    return [int(p) for p in parts]


def of_shape(op: Op, device: str, numbers: list[int]) -> list[Sighting]:
    """Calls of `op` in these sizes, one a dtype and direction; none where it does not take them.

    The sizes stand for the op's dimensions in the order in which they first appear: a norm's rows
    and columns; a matrix product's rows, inner size and columns.
    """
    found = []
    for dtype in dict.fromkeys(c.dtype for c in op.cases if "quick" in c.tags):
        pattern = _pattern(op, dtype)
        if pattern is None:
            continue
        case, sizes = pattern
        if len(numbers) > len(sizes):
            continue
        wanted = dict(zip(sizes, numbers, strict=False))

        def build(case: Case = case, wanted: Sizes = wanted) -> tuple:
            return tuple(_resized(a, wanted, device) for a in case.args())

        try:
            op.check(*build())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
        both = (routes.FORWARD, routes.TRAINING) if op.gradients else (routes.FORWARD,)
        found += [Sighting(op, build, direction, device) for direction in both]
    return found


def _pattern(op: Op, dtype: torch.dtype) -> tuple[Case, list[int]] | None:
    """A case in which every dimension has a size of its own, and these sizes."""
    for case in op.cases:
        if case.dtype != dtype or "quick" not in case.tags:
            continue
        args = case.args()
        tensors = [args[i] for i in op.tensors]
        if not all(isinstance(t, Tensor) and t.is_contiguous() and t.numel() for t in tensors):
            continue
        first = tuple(tensors[0].shape)
        sizes = list(dict.fromkeys(n for t in tensors for n in t.shape))
        if len(first) == 2 and len(set(first)) == 2 and 1 not in sizes:
            return case, sizes
    return None


def _resized(value: Any, wanted: Sizes, device: str) -> Any:
    if isinstance(value, Tensor):
        shape = [wanted.get(n, n) for n in value.shape]
        if value.is_floating_point():
            return torch.randn(shape).to(device, value.dtype)
        count = torch.Size(shape).numel()
        return value.flatten()[torch.arange(count) % value.numel()].view(shape).to(device)
    if type(value) is int:
        return wanted.get(value, value)
    if type(value) is tuple:
        return tuple(wanted.get(n, n) if type(n) is int else n for n in value)
    return value
