"""quant_linear's CASES: real shapes worth timing, awkward ones worth testing."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant.layout import E4M3, E5M2, FP4, INT4, INT8, KINDS, MXFP8, NF4
from fastllm.ops.quant_linear.spec import DYNAMIC, FLOAT, STATIC

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

# (kind, group, symmetric, activations)
FORMATS: tuple[tuple[int, int, bool, int], ...] = (
    (INT8, 0, True, FLOAT), (INT8, 0, True, DYNAMIC), (INT8, 0, True, STATIC),
    (INT8, -1, True, FLOAT), (INT8, -1, True, DYNAMIC), (INT8, 32, True, FLOAT),
    (INT8, 64, True, DYNAMIC), (INT4, 32, True, FLOAT), (INT4, 32, True, DYNAMIC),
    (INT4, 128, False, FLOAT), (INT4, 64, False, DYNAMIC), (INT4, 0, True, FLOAT),
    (INT4, 0, True, DYNAMIC), (NF4, 64, True, FLOAT), (FP4, 64, True, FLOAT),
    (E4M3, 0, True, FLOAT), (E5M2, -1, True, FLOAT), (E4M3, -32, True, FLOAT),
    (MXFP8, 32, True, FLOAT),
)  # fmt: skip
# (M, K, N): a token, a few, more than one tile of everything, odd ones, empty ones
SHAPES = (
    (1, 256, 48), (3, 129, 50), (4, 64, 17), (5, 31, 40), (16, 320, 33), (17, 3, 5), (33, 96, 65),
    (64, 300, 140), (130, 1, 31), (70, 2200, 24), (1, 1, 1), (3, 0, 4), (0, 5, 3),
)  # fmt: skip
BENCH = ((1, 4096, 4096), (4, 4096, 4096), (64, 4096, 4096), (512, 4096, 4096))
BENCH_FORMATS = (
    (INT8, 0, True, FLOAT), (INT8, 0, True, DYNAMIC), (INT4, 32, True, FLOAT),
    (INT4, 32, True, DYNAMIC), (NF4, 64, True, FLOAT), (E4M3, 0, True, FLOAT),
)  # fmt: skip


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(itertools.chain(_bench(), _test()))


def _bench() -> Iterator[Case]:
    for form, shape in itertools.product(BENCH_FORMATS, BENCH):
        yield _case(shape, form, BF16, bias=False, tags={"bench"})
    for shape in BENCH:
        yield _case(shape, BENCH_FORMATS[1], FP32, bias=False, tags={"bench"})


def _test() -> Iterator[Case]:
    bias, dtypes = itertools.cycle((True, False, True)), itertools.cycle((FP32, BF16, FP16))
    for form in FORMATS:
        for shape in SHAPES[: -4 if form[2] else -5]:
            yield _case(shape, form, next(dtypes), bias=next(bias), tags={"quick"})
        next(dtypes)
    for form, shape in itertools.product(FORMATS[:2], SHAPES[-4:]):
        yield _case(shape, form, next(dtypes), bias=shape[1] == 0, tags={"quick"})
    for dtype in (FP32, BF16, FP16):  # every optional argument
        yield _case((9, 128, 40), (INT4, 64, False, STATIC), dtype, bias=True, tags={"quick"})
    for layout, form in itertools.product(("3d", "strided", "transposed"), FORMATS[:2]):
        yield _case((24, 64, 40), form, BF16, bias=True, layout=layout, tags={"quick"})
    for form in (FORMATS[0], FORMATS[7], FORMATS[13], FORMATS[15]):
        yield _case((3, 33, 5), form, FP64, bias=True, tags={"quick"})
    # every optional argument, one of them unused
    yield _case((3, 66, 5), (INT4, 64, False, FLOAT), FP64, bias=True, spare=True, tags={"quick"})
    for values, form in itertools.product(("zeros", "nan", "infinite"), FORMATS[:2]):
        yield _case((6, 64, 20), form, FP32, bias=True, values=values, tags={"adversarial"})
    for form, dtype in itertools.product(((INT4, 32, True, FLOAT), FORMATS[0]), (FP32, BF16, FP16)):
        yield _case((3, 256, 20), form, dtype, bias=False, values="outlier", tags={"adversarial"})
        yield _case((9, 256, 20), form, dtype, bias=False, values="outlier", tags={"adversarial"})
    for dtype in (FP32, BF16, FP16):  # more digits, of the last block a few numbers
        yield _case((9, 300, 70), FORMATS[0], dtype, bias=True, values="loud", tags={"quick"})
    yield _case((9, 96, 20), FORMATS[7], FP16, bias=True, values="infinite", tags={"adversarial"})
    yield _case((200, 300, 140), FORMATS[8], BF16, bias=True, tags={"quick"})
    yield _case(
        (3, 64, 20), (INT4, 32, False, FLOAT), FP32, bias=True, values="large", tags={"quick"}
    )
    for mode in (FLOAT, DYNAMIC):  # a group longer than what is read at once
        yield _case((3, 1300, 20), (INT4, 1024, False, mode), BF16, bias=True, tags={"quick"})
    # many tokens, for kernels that turn the weight: of one stretch and of several
    many = ((200, 300, 140), (300, 1100, 70))
    for shape, form, dtype in zip(
        many * 2, (*FORMATS[1:3], FORMATS[4], FORMATS[1]), (FP32, BF16, FP16, BF16), strict=True
    ):
        yield _case(shape, form, dtype, bias=dtype != FP16, tags={"quick"})
    yield _case((200, 300, 140), FORMATS[1], FP32, bias=True, values="nan", tags={"adversarial"})
    # activations after each way of computing: a token, a block, the weight turned, 16-bit tiles
    ways = (
        ((2, 256, 40), FORMATS[7], BF16, "gelu"), ((1, 256, 40), FORMATS[1], FP32, "silu"),
        ((33, 96, 65), FORMATS[1], FP32, "gelu"), ((140, 96, 65), FORMATS[1], FP32, "gelu"),
        ((140, 96, 65), FORMATS[2], BF16, "gelu_tanh"), ((140, 96, 65), FORMATS[4], FP16, "silu"),
        ((33, 96, 65), FORMATS[9], FP16, "relu2"), ((17, 300, 33), FORMATS[13], FP32, "relu"),
        ((33, 96, 65), FORMATS[0], BF16, "gelu"), ((3, 0, 4), FORMATS[0], FP32, "gelu"),
    )  # fmt: skip
    for shape, form, dtype, activation in ways:
        yield _case(shape, form, dtype, bias=True, activation=activation, tags={"quick"})
    yield _case((2, 140000, 3), FORMATS[1], FP32, bias=False, tags={"quick"})  # past int32
    yield _case((6, 140000, 3), FORMATS[1], FP32, bias=False, tags={"quick"})
    # columns in float: some, most of them, none, in tokens of every number
    apart = (
        ((1, 256, 40), FORMATS[1], FP32, 6.0, None), ((9, 129, 50), FORMATS[1], BF16, 6.0, "gelu"),
        ((140, 96, 65), FORMATS[1], FP16, 6.0, None), ((17, 300, 33), FORMATS[2], FP32, 6.0, None),
        ((33, 96, 65), FORMATS[4], BF16, 6.0, None), ((5, 320, 33), FORMATS[6], FP32, 6.0, "silu"),
        ((9, 129, 50), FORMATS[8], FP32, 6.0, None), ((70, 300, 24), FORMATS[10], BF16, 6.0, None),
        ((16, 96, 40), FORMATS[12], FP16, 6.0, None), ((9, 129, 50), FORMATS[1], FP32, 1.5, None),
        ((9, 128, 40), FORMATS[1], FP32, 1e3, None), ((3, 0, 4), FORMATS[1], FP32, 6.0, None),
        ((9, 128, 40), (INT8, -32, True, DYNAMIC), FP32, 6.0, None),
    )  # fmt: skip
    for shape, form, dtype, threshold, name in apart:
        yield _case(
            shape, form, dtype, bias=dtype != FP16, activation=name, threshold=threshold,
            values="loud", tags={"quick"},
        )  # fmt: skip
    for values in ("nan", "infinite"):
        yield _case(
            (6, 64, 20), FORMATS[1], FP32, bias=True, threshold=6.0, values=values,
            tags={"adversarial"},
        )  # fmt: skip


def _case(
    shape: tuple[int, int, int],
    form: tuple[int, int, bool, int],
    dtype: torch.dtype,
    *,
    bias: bool,
    layout: str = "contiguous",
    values: str = "normal",
    spare: bool = False,
    activation: str | None = None,
    threshold: float = 0.0,
    tags: set[str],
) -> Case:
    m, k, n = shape
    code, group, symmetric, activations = form

    def build(generator: torch.Generator) -> tuple:
        x = _input((m, k), layout, generator).to(dtype, memory_format=torch.preserve_format)
        w = torch.randn(n, k, generator=generator) * max(k, 1) ** -0.5
        if values == "zeros":
            x.zero_()
        elif values == "large":
            x *= 1e33
        elif values == "loud":
            x[:, 3:k:40] *= 20
        elif values == "outlier":  # that no weight sees: its neighbours must not suffer
            x[:, 3], w[:, 3] = 1000.0, 0.0
        elif values != "normal":
            x[1, 3] = float("inf" if values == "infinite" else "nan")
        codes, scales, zeros = quant.quantize(w, code, group, symmetric)
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        given = torch.tensor([0.03]) if activations == STATIC or spare else None
        rest = (b, given, *form[:2], activations, activation, threshold)
        return x, codes, scales, None if symmetric else zeros, *rest

    mode = ("", "-dynamic", "-static")[activations]
    kind = KINDS[code] + "-asym" * (not symmetric)
    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}-{kind}-g{group}{mode}" + "-bias" * bias
    name += f"-{activation}" if activation else ""
    name += f"-above{threshold:g}" if threshold else ""
    name += "-spare" * spare + f"-{layout}" * (layout != "contiguous")
    name += f"-{values}" * (values != "normal")
    return Case(name, dtype, build, frozenset(tags))


def _input(shape: tuple[int, int], layout: str, generator: torch.Generator) -> Tensor:
    m, k = shape
    if layout == "3d":
        return torch.randn(2, m // 2, k, generator=generator)
    if layout == "transposed":
        return torch.randn(k, m, generator=generator).t()
    if layout == "strided":
        return torch.randn(m, k + 3, generator=generator)[:, 1:-2]
    return torch.randn(m, k, generator=generator)
