"""Rotary embedding's CASES: the layouts of attention, partial and half tables, hostile values."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(_cases())


def _cases() -> Iterator[Case]:
    for (sizes, tags), dtype in itertools.product(
        (((1, 32, 8, 1, 128), {"bench", "quick"}), ((1, 32, 8, 1024, 64), {"bench"})),
        (FP32, BF16),
    ):  # B, H, G, T, D
        yield _case(sizes, dtype, layout="bthd", tags=tags)
    small = (
        (1, 1, 1, 1, 2),
        (2, 3, 1, 7, 6),
        (1, 4, 2, 33, 40),
        (3, 2, 2, 5, 64),
        (1, 2, 1, 3, 130),
    )
    options: Iterator[dict[str, Any]] = itertools.cycle(
        [{}, {"interleaved": True}, {"half": True}, {"half": True, "interleaved": True}]
    )
    for size, dtype in itertools.product(small, (FP32, BF16, FP16)):
        yield _case(size, dtype, **next(options))
    for interleaved, half in itertools.product((False, True), repeat=2):
        kind: dict[str, Any] = {"interleaved": interleaved, "half": half}
        yield _case((2, 4, 2, 9, 48), FP32, rotary=20, **kind)
        yield _case((2, 4, 2, 9, 48), BF16, rotary=16, layout="bthd", **kind)
        yield _case((2, 4, 2, 9, 48), FP32, batched=True, layout="bthd", **kind)
        yield _case((2, 2, 1, 3, 8), FP64, batched=half, rotary=6, **kind)
    yield _case((2, 2, 1, 3, 8), FP32, layout="columns")
    for values, dtype in itertools.product(("infinite", "nan", "large", "tiny"), (FP32, BF16)):
        yield _case((1, 2, 1, 4, 32), dtype, values=values, tags={"adversarial"})
    yield _case((1, 2, 1, 0, 32), FP32)
    yield _case((2, 2, 1, 5, 32), BF16, tables=FP32)


def _case(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    rotary: int | None = None,
    interleaved: bool = False,
    half: bool = False,
    batched: bool = False,
    layout: str = "bhtd",
    values: str = "normal",
    tables: torch.dtype | None = None,
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    batch, heads, groups, length, dim = sizes
    rotary = rotary or dim

    def build(generator: torch.Generator) -> tuple[Any, ...]:
        query = _tensor((batch, heads, length, dim), layout, values, generator).to(dtype)
        key = _tensor((batch, groups, length, dim), layout, "normal", generator).to(dtype)
        shape = ((batch,) if batched else ()) + (length, rotary // 2 if half else rotary)
        angles = torch.rand(shape, generator=generator) * 6.3
        kind = tables or dtype
        return query, key, angles.cos().to(kind), angles.sin().to(kind), rotary, interleaved

    parts = ["x".join(map(str, sizes)), NAMES[dtype]]
    parts += [f"r{rotary}"] * (rotary != dim) + ["interleaved"] * interleaved + ["half"] * half
    parts += ["batched"] * batched + [layout] * (layout != "bhtd") + [values] * (values != "normal")
    parts += ["wide-tables"] * (tables is not None)
    return Case("-".join(parts), dtype, build, frozenset(tags))


def _tensor(shape: tuple[int, ...], layout: str, values: str, generator: torch.Generator) -> Tensor:
    if layout == "bthd":
        batch, heads, length, dim = shape
        x = torch.randn((batch, length, heads, dim), generator=generator).transpose(1, 2)
    elif layout == "columns":
        x = torch.randn((*shape[:-2], shape[-1], shape[-2]), generator=generator).mT
    else:
        x = torch.randn(shape, generator=generator)
    if values == "infinite":
        x[..., -1] = float("inf")
    elif values == "nan":
        x[..., 0] = float("nan")
    elif values == "large":
        x *= 1e4
    elif values == "tiny":
        x *= 1e-39
    return x
