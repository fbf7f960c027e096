"""CASES of quantize and dequantize: every kind, group and dtype; odd rows, zeros, NaN, extremes."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.quant import reference
from fastllm.ops.quant.layout import E4M3, E5M2, FP4, INT4, INT8, KINDS, MXFP8, NF4

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
# (kind, group, symmetric)
FORMATS = (
    (INT8, 0, True), (INT8, -1, True), (INT8, 32, True), (INT4, 32, True), (INT4, 32, False),
    (INT4, 128, True), (INT4, 0, False), (NF4, 64, True), (FP4, 64, True), (E4M3, 0, True),
    (E4M3, -1, True), (E4M3, -128, True), (E4M3, 64, True), (E5M2, 0, True), (MXFP8, 32, True),
)  # fmt: skip
# short last groups, odd rows, one value, rows longer than a block of any kernel, nothing at all
SHAPES = ((5, 7), (33, 64), (3, 4097), (2, 9, 130), (1, 1), (130, 259), (4, 0), (0, 32))
VALUES = ("zeros", "constant", "positive", "outlier", "ties", "tiny", "huge", "nan", "infinite")
BENCH = (
    (INT8, 0, True), (INT8, 32, True), (INT4, 32, True), (INT4, 128, False), (NF4, 64, True),
    (E4M3, 0, True), (E4M3, -128, True), (MXFP8, 32, True),
)  # fmt: skip


def quantize_cases() -> tuple[Case, ...]:
    """All cases of quantize."""
    return tuple(_quantize())


def dequantize_cases() -> tuple[Case, ...]:
    """All cases of dequantize."""
    return tuple(_dequantize())


def _quantize() -> Iterator[Case]:
    for form, dtype in itertools.product(BENCH, (FP32, BF16)):
        yield _case((4096, 4096), dtype, form, tags={"bench"})
    for form, (shape, dtype) in itertools.product(FORMATS, _sizes()):
        yield _case(shape, dtype, form)
    for form in FORMATS:
        yield _case((6, 70), FP64, form)
    for form, values in itertools.product(FORMATS, VALUES):
        dtype = FP16 if values == "huge" else FP32
        yield _case((9, 200), dtype, form, values, tags={"adversarial"})
        yield _case((9, 200), BF16, form, values, tags={"adversarial"})
    for form, values in itertools.product(FORMATS, ("transposed", "expanded", "strided")):
        yield _case((24, 130), FP32, form, values)
    yield _case((70,), FP32, (INT8, 32, True))
    yield _case((70,), FP32, (INT4, 0, False))


def _dequantize() -> Iterator[Case]:
    for form, dtype in itertools.product(BENCH, (FP32, BF16)):
        yield _back((4096, 4096), dtype, form, tags={"bench"})
    for form, (shape, dtype) in itertools.product(FORMATS, _sizes()):
        yield _back(shape, dtype, form)
    for form in FORMATS:
        yield _back((6, 70), FP64, form)
    for form, values in itertools.product(FORMATS, ("zeros", "tiny", "huge", "nan")):
        yield _back((9, 200), FP16 if values == "huge" else FP32, form, values)
        yield _back((9, 200), BF16, form, values)
    for symmetric, dtype in itertools.product((True, False), (FP32, BF16, FP16)):
        for scale in (FP32, FP16):  # as other libraries store them
            yield _back((33, 131), dtype, (INT4, 32, symmetric), scale=scale)
    for values in ("fractional", "transposed"):
        yield _back((17, 130), FP32, (INT4, 64, False), values)
    yield _back((17, 130), FP32, (INT8, 0, True), "transposed")


def fake_cases() -> tuple[Case, ...]:
    """All cases of fake_quantize."""
    return tuple(_fake())


def _fake() -> Iterator[Case]:
    yield _faked((33, 64), FP32, (INT8, 32, True), True)  # has every argument
    for form, given in itertools.product(FORMATS, (False, True)):
        if given and not learnable(form):
            continue
        skipped = ((1, 1), (0, 32), (33, 64) if given else (2, 9, 130))
        for shape, dtype in _sizes():
            if shape not in skipped:
                yield _faked(shape, dtype, form, given)
        yield _faked((6, 70), FP64, form, given)
        odd = ("outlier", "tiny", "infinite") if given else ("nan",)
        for values in ("zeros", "ties", "huge", *odd):
            dtype = FP16 if values == "huge" else FP32
            yield _faked((9, 200), dtype, form, given, values, {"adversarial"})
        yield _faked((24, 130), BF16, form, given, "transposed")
    for form in ((INT8, 0, True), (INT4, 32, True), (NF4, 64, True), (E4M3, -128, True)):
        for dtype, given in itertools.product((FP32, BF16), (False, True)):
            yield _faked((4096, 4096), dtype, form, given, tags={"bench"})


def encode_cases() -> tuple[Case, ...]:
    """All cases of encode: those of fake_quantize with ranges, but for the values of the latter."""
    return tuple(_encode())


def _encode() -> Iterator[Case]:
    for form in filter(learnable, FORMATS):
        for shape, dtype in _sizes():
            if shape not in ((1, 1), (0, 32)):
                yield _encoded(shape, dtype, form)
        yield _encoded((6, 70), FP64, form)
        for values in ("zeros", "ties", "huge", "outlier", "nan", "infinite"):
            dtype = FP16 if values == "huge" else FP32
            yield _encoded((9, 200), dtype, form, values, {"adversarial"})
        yield _encoded((24, 130), BF16, form, "transposed")
    for form in ((INT8, 0, True), (INT4, 32, True), (NF4, 64, True)):
        yield _encoded((4096, 4096), FP32, form, tags={"bench"})


def _encoded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: tuple[int, int, bool],
    values: str = "normal",
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    faked = _faked(shape, dtype, form, True, values, tags)

    def build(generator: torch.Generator) -> tuple:
        return faked.build(generator)[:4]

    return Case(faked.name.removesuffix("-given"), dtype, build, faked.tags)


def learnable(form: tuple[int, int, bool]) -> bool:
    """Whether scales may be given."""
    code, _, symmetric = form
    return symmetric and code != MXFP8


def _faked(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: tuple[int, int, bool],
    given: bool,
    values: str = "normal",
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    code, group, symmetric = form

    def build(generator: torch.Generator) -> tuple:
        x = _tensor(shape, values, generator, dtype)
        scales = None
        if given:  # narrower than the values, so that some are outside
            wide = _tensor(shape, "normal" if values in ("nan", "infinite") else values,
                           generator, dtype)  # fmt: skip
            scales = reference.quantize(wide, code, group, symmetric)[1] * 0.71
        return x, scales, *form

    name = _name(shape, dtype, form, values) + "-given" * given
    return Case(name, dtype, build, frozenset(tags))


def _sizes() -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    kinds = itertools.cycle((FP32, BF16, FP16))
    for shape in SHAPES:
        yield shape, next(kinds)
    for dtype in (FP32, BF16, FP16):
        yield (40, 129), dtype


def _case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: tuple[int, int, bool],
    values: str = "normal",
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        return (_tensor(shape, values, generator, dtype), *form)

    return Case(_name(shape, dtype, form, values), dtype, build, frozenset(tags))


def _back(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    form: tuple[int, int, bool],
    values: str = "normal",
    scale: torch.dtype | None = None,
    tags: set[str] = frozenset(("quick",)),  # type: ignore[assignment]
) -> Case:
    code, group, symmetric = form

    def build(generator: torch.Generator) -> tuple:
        x = _tensor(shape, values, generator, FP32 if dtype == FP64 else dtype)
        codes, scales, zeros = reference.quantize(x, code, group, symmetric)
        if scale is not None:
            scales, zeros = scales.to(scale), zeros.to(scale)
        if values == "fractional":
            zeros = zeros + 0.25
        if values == "transposed":
            codes = codes.t().contiguous().t()
        return codes, scales, zeros, code, group, shape[-1], dtype

    name = _name(shape, dtype, form, values) + (f"-{NAMES[scale]}" if scale else "")
    return Case(name, dtype, build, frozenset(tags))


def _name(
    shape: tuple[int, ...], dtype: torch.dtype, form: tuple[int, int, bool], values: str
) -> str:
    code, group, symmetric = form
    where = {0: "row", -1: "tensor"}.get(group, f"g{group}" if group > 0 else f"block{-group}")
    kind = KINDS[code] + ("" if symmetric else "_asym")
    name = f"{kind}-{where}-{'x'.join(map(str, shape))}-{NAMES[dtype]}"
    return name + f"-{values}" * (values != "normal")


def _tensor(
    shape: tuple[int, ...], values: str, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    if values == "transposed":
        return torch.randn(shape[::-1], generator=generator).to(dtype).t()
    if values == "expanded":
        return torch.randn(shape[1:], generator=generator).to(dtype).expand(shape)
    if values == "strided":
        wide = (*shape[:-1], 2 * shape[-1])
        return torch.randn(wide, generator=generator).to(dtype)[..., ::2]
    x = torch.randn(shape, generator=generator)
    if values == "zeros":
        x[1:], x[0, :64] = 0.0, 0.0
    elif values == "constant":
        x[:] = x[:, :1]
    elif values == "positive":
        x = x.abs() + 0.5
    elif values == "outlier":
        x[:, ::67] *= 1000
    elif values == "ties":  # quotients halfway between two codes of the integer kinds
        x = torch.randint(-15, 15, shape, generator=generator) + 0.5
        x[:, ::32] = -127.0
        x[::2, ::32] = -8.0
    elif values == "tiny":  # subnormal numbers
        x *= 1e-39 if dtype != FP16 else 1e-7
    elif values == "huge":
        top = torch.finfo(dtype).max
        x = (x.double() * top).clamp(-top, top)
    elif values == "nan":
        x[1, 2] = float("nan")
    elif values == "infinite":
        x[1, 2], x[2, 70] = float("inf"), -float("inf")
    return x.to(dtype)
