"""Embedding's CASES: real vocabularies, few and many repeats, every option."""

import itertools
from collections.abc import Iterator

import torch

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(_cases())


def _cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        yield _case(8192, 512, (4, 512), dtype, tags={"bench"})
        yield _case(32000, 512, (1, 16), dtype, tags={"bench"})
    sizes = ((1, 1, (1,)), (5, 7, (3, 4)), (100, 64, (2, 33)), (17, 129, (40,)), (300, 1030, (9,)))
    options = itertools.cycle(itertools.product((-1, 0), (False, True)))
    for (rows, cols, shape), dtype in itertools.product(sizes, (FP32, BF16, FP16)):
        padding, scale = next(options)
        yield _case(rows, cols, shape, dtype, padding, scale)
    for padding, scale in itertools.product((-1, 3), (False, True)):
        yield _case(9, 40, (6, 11), FP32, padding, scale, index=torch.int32)
    for padding in (-1, 3):  # by frequency it is no derivative: not for gradcheck
        yield _case(5, 3, (2, 4), FP64, padding)
    yield _case(9, 40, (6, 11), FP32, layout="columns")
    yield _case(9, 40, (6, 11), FP32, layout="rows")
    for shape in ((0,), (2, 0), ()):
        yield _case(9, 16, shape, FP32)
    for value in (float("inf"), float("nan")):
        yield _case(9, 16, (30,), FP32, value=value, tags={"adversarial"})


def _case(
    rows: int,
    cols: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    padding: int = -1,
    scale: bool = False,
    index: torch.dtype = torch.int64,
    layout: str = "plain",
    value: float | None = None,
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        if layout == "columns":
            weight = torch.randn((cols, rows), generator=generator).t()
        elif layout == "rows":
            weight = torch.randn((rows, cols + 3), generator=generator)[:, :cols]
        else:
            weight = torch.randn((rows, cols), generator=generator)
        if value is not None:
            weight[1, 2] = value
        # squared: some indices come often, some never
        place = torch.rand(shape, generator=generator).square() * rows
        return weight.to(dtype), place.to(index).clamp(max=rows - 1), padding, scale

    parts = [f"{rows}x{cols}", "x".join(map(str, shape)) or "scalar", NAMES[dtype]]
    parts += [f"pad{padding}"] * (padding >= 0) + ["by-freq"] * scale
    parts += ["int32"] * (index is torch.int32) + [layout] * (layout != "plain")
    parts += [f"{value:g}"] if value is not None else []
    return Case("-".join(parts), dtype, build, frozenset(tags))
