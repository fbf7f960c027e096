"""The norm family's CASES: real shapes worth timing, awkward ones worth testing, hostile values."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

# what a transformer block sees, from one decoded token to a long batch
BENCH_SHAPES = ((1, 64), (1, 4096), (16, 4096), (2048, 768), (4096, 4096))
# every remainder of a vector, one column, rows that split unevenly, rows past every block size
TEST_SHAPES = (
    (1, 1), (3, 7), (2, 3, 64), (5, 1, 129), (33, 255), (7, 1000), (1, 4097), (130, 96), (2, 33000),
)  # fmt: skip
PARAMS = ("both", "weight", "bias", "none")
LAYOUTS = ("contiguous", "transposed", "expanded", "strided")
VALUES = ("infinite", "nan", "zeros", "equal", "large", "tiny", "shifted")


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op of the family."""
    found = _bench_group() if op == "group_norm" else _bench_rows(op)
    more = _test_group() if op == "group_norm" else _test_rows(op)
    return tuple(itertools.chain(found, more))


def _bench_rows(op: str) -> Iterator[Case]:
    for shape, dtype in itertools.product(BENCH_SHAPES, (FP32, BF16)):
        tags = {"bench"} | ({"quick"} if shape[0] <= 16 else set())
        yield _row_case(op, shape, dtype, dtype, "both", tags=tags)


def _test_rows(op: str) -> Iterator[Case]:
    """Pairwise: every shape with every dtype, the other options rotating through."""
    options = itertools.cycle(itertools.product(PARAMS, (0.0, 1.0)))
    for shape, dtype in itertools.product(TEST_SHAPES, DTYPES.values()):
        params, offset = next(options)
        yield _row_case(op, shape, dtype, dtype, params, offset, tags={"quick"})
    for dtype, weight in ((BF16, FP32), (FP16, FP32)):
        for params in PARAMS[:3]:
            yield _row_case(op, (17, 96), dtype, weight, params, 1.0, tags={"quick"})
    for layout, dtype in itertools.product(LAYOUTS[1:], (FP32, BF16)):
        yield _row_case(op, (6, 10, 80), dtype, dtype, "both", layout=layout, tags={"quick"})
    for params in PARAMS:
        yield _row_case(op, (4, 3, 40), FP64, FP64, params, 0.5, tags={"quick"})
    for values, dtype in itertools.product(VALUES, DTYPES.values()):
        if values in ("large", "tiny") and dtype is FP16:
            continue  # out of that dtype's range
        yield _row_case(op, (5, 130), dtype, dtype, "both", values=values, tags={"adversarial"})
    yield _row_case(op, (4, 3, 40), FP32, FP32, "both", dims=2, tags={"quick"})
    for shape in ((0, 64), (2, 0, 64)):
        yield _row_case(op, shape, FP32, FP32, "both", tags={"quick"})


def _bench_group() -> Iterator[Case]:
    for shape, groups in (((8, 320, 32, 32), 32), ((2, 512, 64, 64), 32)):
        for dtype in (FP32, BF16):
            yield _group_case(shape, groups, dtype, dtype, "both", tags={"bench"})


def _test_group() -> Iterator[Case]:
    shapes = (
        ((1, 3), 1), ((2, 6), 3), ((3, 8, 5), 4), ((2, 4, 3, 7), 1), ((2, 12, 9, 11), 12),
        ((1, 64, 65), 8), ((5, 2, 1, 1, 3), 2), ((1, 4, 9000), 2),
    )  # fmt: skip
    params = itertools.cycle(PARAMS)
    for (shape, groups), dtype in itertools.product(shapes, DTYPES.values()):
        yield _group_case(shape, groups, dtype, dtype, next(params), tags={"quick"})
    yield _group_case((2, 8, 6, 5), 4, BF16, FP32, "both", tags={"quick"})
    yield _group_case((2, 8, 6, 5), 4, FP64, FP64, "both", tags={"quick"})
    for layout in LAYOUTS[1:]:
        yield _group_case((2, 8, 6, 5), 4, FP32, FP32, "both", layout=layout, tags={"quick"})
    for values, dtype in itertools.product(VALUES, (FP32, BF16)):
        yield _group_case((3, 8, 33), 4, dtype, dtype, "both", values=values, tags={"adversarial"})
    yield _group_case((0, 8, 6), 4, FP32, FP32, "both", tags={"quick"})


def _row_case(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    params: str,
    offset: float = 0.0,
    layout: str = "contiguous",
    values: str = "normal",
    dims: int = 1,
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    layer, add = "layer" in op, "add" in op
    normalized = shape[len(shape) - dims :]

    def build(generator: torch.Generator) -> tuple:
        x = _tensor(shape, dtype, layout, values, generator)
        extra = (_tensor(shape, dtype, layout, "normal", generator),) if add else ()
        weight = _param(normalized, weight_dtype, params in ("both", "weight"), generator)
        bias = _param(normalized, weight_dtype, params in ("both", "bias"), generator)
        given = (weight, bias) if layer else (weight,)
        return (x, *extra, normalized, *given, 1e-5 if layer else 1e-6, offset)

    name = _name(shape, dtype, weight_dtype, params, layout, values)
    name += f"-offset{offset:g}" * (offset != 0.0) + f"-last{dims}" * (dims != 1)
    return Case(name, dtype, build, frozenset(tags))


def _group_case(
    shape: tuple[int, ...],
    groups: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    params: str,
    layout: str = "contiguous",
    values: str = "normal",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        x = _tensor(shape, dtype, layout, values, generator)
        weight = _param(shape[1:2], weight_dtype, params in ("both", "weight"), generator)
        bias = _param(shape[1:2], weight_dtype, params in ("both", "bias"), generator)
        return (x, groups, weight, bias, 1e-5)

    name = _name(shape, dtype, weight_dtype, params, layout, values) + f"-{groups}groups"
    return Case(name, dtype, build, frozenset(tags))


def _name(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    params: str,
    layout: str,
    values: str,
) -> str:
    parts = ["x".join(map(str, shape)), NAMES[dtype]]
    parts += [f"w{NAMES[weight_dtype]}"] if weight_dtype != dtype else []
    parts += [params] if params != "both" else []
    parts += [layout] if layout != "contiguous" else []
    return "-".join([*parts, values] if values != "normal" else parts)


def _param(
    shape: tuple[int, ...], dtype: torch.dtype, present: bool, generator: torch.Generator
) -> Tensor | None:
    return torch.randn(shape, generator=generator).to(dtype) if present else None


def _tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, values: str, generator: torch.Generator
) -> Tensor:
    if layout == "transposed":
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return _values(swapped, values, generator).to(dtype).transpose(-1, -2)
    if layout == "expanded":
        return _values((1, *shape[1:]), values, generator).to(dtype).expand(shape)
    if layout == "strided":
        wide = _values((*shape[:-1], shape[-1] + 3), values, generator).to(dtype)
        return wide[..., 1:-2]
    return _values(shape, values, generator).to(dtype)


def _values(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=generator)
    if values == "infinite":
        x[..., 0, -1] = float("inf")
    elif values == "nan":
        x[..., 0, 0] = float("nan")
    elif values == "zeros":
        x.zero_()
    elif values == "equal":
        x.fill_(3.25)
    elif values == "large":
        x *= 1e15
    elif values == "tiny":
        x *= 1e-39
    elif values == "shifted":
        x += 500.0
    return x
