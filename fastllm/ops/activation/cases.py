"""The activations' CASES: real shapes worth timing, awkward ones worth testing, hostile values."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.activation.spec import APPROXIMATE, GATED

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

BENCH_SHAPES: tuple[tuple[int, ...], ...] = ((1, 1408), (16, 11008), (2048, 1408))
LONG = (2048, 8192)  # past the caches; of one op, to keep tests short
# every remainder of a vector, odd and prime sizes, parts of every size
TEST_SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 1),
    (3, 7),
    (2, 3, 64),
    (5, 1, 129),
    (33, 255),
    (1, 8197),
    (2, 16400),
)
EMPTY: tuple[tuple[int, ...], ...] = ((0, 64), (2, 0), ())
# halves: the two halves of one fused projection
LAYOUTS = ("halves", "transposed", "expanded", "strided", "heads")
VALUES = ("infinite", "nan", "zeros", "large", "tiny")


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op of the family."""
    forms = ("none", "tanh") if op in APPROXIMATE else (None,)
    return tuple(c for form in forms for c in _cases(op, form))


def _cases(op: str, form: str | None) -> Iterator[Case]:
    for shape, dtype in itertools.product(BENCH_SHAPES, (FP32, BF16)):
        tags = {"bench"} | ({"quick"} if shape[0] <= 16 else set())
        yield _case(op, form, shape, dtype, tags=tags)
    if op == "swiglu":
        yield _case(op, form, BENCH_SHAPES[-1], BF16, "halves", tags={"bench"})
        yield _case(op, form, LONG, FP32, tags={"bench"})
        yield _case(op, form, LONG, BF16, tags={"bench"})
    dtypes = (FP32, BF16, FP16)
    whole = form != "tanh"  # the second form of an op goes through the same code: pairwise
    pairs = itertools.product(TEST_SHAPES, dtypes)
    for shape, dtype in pairs if whole else zip(TEST_SHAPES, itertools.cycle(dtypes)):
        yield _case(op, form, shape, dtype, tags={"quick"})
    for layout, dtype in itertools.product(LAYOUTS, (FP32, BF16) if whole else (FP32,)):
        yield _case(op, form, (6, 10, 80), dtype, layout, tags={"quick"})
    yield _case(op, form, (4, 3, 10), FP64, tags={"quick"})
    for values, dtype in itertools.product(VALUES, dtypes if whole else (FP32,)):
        yield _case(op, form, (5, 130), dtype, values=values, tags={"adversarial"})
    for shape in EMPTY:
        yield _case(op, form, shape, FP32, tags={"quick"})


def _case(
    op: str,
    form: str | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    values: str = "normal",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        if layout == "halves":
            wide = _values((*shape[:-1], 2 * shape[-1]), values, generator).to(dtype)
            inputs = wide.chunk(2, -1)
        else:
            inputs = (
                _tensor(shape, dtype, layout, values, generator),
                _tensor(shape, dtype, layout, "normal", generator),
            )
        given = inputs if op in GATED else inputs[:1]
        return given if form is None else (*given, form)

    parts = ["x".join(map(str, shape)) or "scalar", NAMES[dtype]]
    parts += [x for x in (form, layout, values) if x not in (None, "none", "contiguous", "normal")]
    return Case("-".join(parts), dtype, build, frozenset(tags))


def _tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, values: str, generator: torch.Generator
) -> Tensor:
    if layout == "transposed":  # columns are not adjacent
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return _values(swapped, values, generator).to(dtype).transpose(-1, -2)
    if layout == "expanded":
        return _values((1, *shape[1:]), values, generator).to(dtype).expand(shape)
    if layout == "strided":  # rows evenly spaced, and aligned to nothing
        wide = _values((*shape[:-1], shape[-1] + 3), values, generator).to(dtype)
        return wide[..., 1:-2]
    if layout == "heads":  # rows not evenly spaced
        swapped = (shape[1], shape[0], shape[2])
        return _values(swapped, values, generator).to(dtype).transpose(0, 1)
    return _values(shape, values, generator).to(dtype)


def _values(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator) * 2
    if values == "infinite":
        x[..., 0, -1] = float("inf")
    elif values == "nan":
        x[..., 0, 0] = float("nan")
    elif values == "zeros":
        x.zero_()
    elif values == "large":
        x *= 1e4
    elif values == "tiny":
        x *= 1e-39
    return x
