"""sparse_linear's CASES: real shapes worth timing, awkward ones worth testing."""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant.layout import INT8
from fastllm.ops.sparse_linear.layout import count, places
from fastllm.ops.sparse_linear.spec import DYNAMIC, FLOAT

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

FORMS = ((False, FLOAT), (True, FLOAT), (True, DYNAMIC))  # (int8 values, activations)
# (M, K, N): one token, a few, many; whole vectors, tails of every kind, nothing
SHAPES = (
    (1, 256, 48), (2, 64, 16), (3, 129, 50), (4, 60, 17), (5, 31, 40), (7, 1100, 9), (8, 2, 3),
    (17, 96, 33), (35, 130, 24), (1, 1, 1), (3, 0, 4), (0, 5, 3),
)  # fmt: skip
PAIRS = (3, 5, 6, 9, 10, 12)  # four bits, two of them set
BENCH = ((1, 4096, 4096), (8, 4096, 4096))


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(itertools.chain(_bench(), _test()))


def _bench() -> Iterator[Case]:
    for form in FORMS:
        yield _case(BENCH[0], form, BF16, bias=False, tags={"bench"})
    for shape in BENCH:
        yield _case(shape, FORMS[0], FP32, bias=False, tags={"bench"})


def _test() -> Iterator[Case]:
    bias = itertools.cycle((True, False, True))
    dtypes = itertools.cycle((FP32, BF16, FP16))
    for shape in SHAPES[:9]:
        for form in FORMS:
            yield _case(shape, form, next(dtypes), bias=next(bias), tags={"quick"})
        next(dtypes)  # each form meets each dtype
    for shape, form in itertools.product(SHAPES[9:], FORMS):
        yield _case(shape, form, FP32, bias=shape[1] == 0, tags={"quick"})
    for layout, form in itertools.product(("3d", "strided"), FORMS):
        yield _case((6, 64, 40), form, BF16, bias=True, layout=layout, tags={"quick"})
    for form in FORMS[:2]:
        yield _case((3, 33, 5), form, FP64, bias=True, tags={"quick"})
    yield _case((2, 140000, 3), FORMS[2], FP32, bias=False, tags={"quick"})  # long sums
    for values, form in itertools.product(("zeros", "nan", "infinite"), FORMS):
        yield _case((5, 64, 20), form, FP32, bias=True, values=values, tags={"adversarial"})


def _case(
    shape: tuple[int, int, int],
    form: tuple[bool, int],
    dtype: torch.dtype,
    *,
    bias: bool,
    layout: str = "contiguous",
    values: str = "normal",
    tags: set[str],
) -> Case:
    m, k, n = shape
    integer, activations = form

    def build(generator: torch.Generator) -> tuple:
        x = torch.randn(m, k + 3, generator=generator)
        x = x[:, 1:-2] if layout == "strided" else x[:, :k].contiguous()
        x = x.to(dtype, memory_format=torch.preserve_format)
        if values == "zeros":
            x.zero_()
        elif values != "normal":  # the first four, so that one of them is kept
            x[1, :4] = float("inf" if values == "infinite" else "nan")
        x = x.view(2, m // 2, k) if layout == "3d" else x
        w, kept = _weight(n, k, generator)
        scales = None
        w = w.to(dtype)
        if integer:
            w, scales, _ = quant.quantize(w.float(), INT8, 0, True)
            scales = scales[:, 0].contiguous()
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        return x, w, kept, scales, b, activations

    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}" + "-int8" * integer
    name += "-dynamic" * activations + "-bias" * bias
    name += f"-{layout}" * (layout != "contiguous") + f"-{values}" * (values != "normal")
    return Case(name, dtype, build, frozenset(tags))


def _weight(n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random (values, kept) of a weight [N, K]; what is kept past K is 0."""
    values = torch.randn(n, count(k), generator=generator) * max(k, 1) ** -0.5
    which = torch.randint(len(PAIRS), (n, count(k) // 2), generator=generator)
    fours = F.pad(torch.tensor(PAIRS, dtype=torch.uint8)[which], (0, count(k) // 2 % 2))
    kept = fours[:, ::2] | fours[:, 1::2] << 4
    return values.where(places(kept, k) < k, 0.0) if k % 4 else values, kept
