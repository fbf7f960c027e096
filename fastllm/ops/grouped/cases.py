"""CASES of grouped_linear: layers of mixtures of experts, and uneven shares of the tokens."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

# (rows, K, N, experts): 512 tokens to 2 of 8 experts (Mixtral's way), to 8 of 64 (Qwen's way)
BENCH_SHAPES = ((1024, 512, 1792, 8), (4096, 512, 256, 64), (16, 512, 1792, 8))
# rows of each expert, rows that belong to none, K, N
TEST_SHAPES: tuple[tuple[tuple[int, ...], int, int, int], ...] = (
    ((1,), 0, 1, 1),
    ((3, 0, 5), 0, 7, 9),
    ((0, 0, 17, 1), 3, 33, 16),
    ((16, 16), 0, 64, 32),
    ((0, 0), 5, 24, 8),
    ((40, 1, 23, 0, 66), 0, 65, 70),
)


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(itertools.chain(_bench(), _test()))


def _bench() -> Iterator[Case]:
    for (rows, inner, outputs, experts), dtype in itertools.product(BENCH_SHAPES, (FP32, BF16)):
        counts = (rows // experts,) * experts
        yield _case(counts, 0, inner, outputs, dtype, bias=False, tags={"bench"})


def _test() -> Iterator[Case]:
    bias = itertools.cycle((True, False))
    for shape, dtype in itertools.product(TEST_SHAPES[1:], (FP32, BF16, FP16)):
        yield _case(*shape, dtype, bias=next(bias), tags={"quick"})
    yield _case(*TEST_SHAPES[0], FP32, bias=True, tags={"quick"})
    for with_bias in (True, False):
        yield _case((2, 0, 3), 1, 5, 4, FP64, bias=with_bias, tags={"quick"})
    for layout, dtype in itertools.product(("transposed", "expanded", "strided"), (FP32, FP16)):
        yield _case((5, 0, 12), 1, 24, 40, dtype, bias=True, layout=layout, tags={"quick"})
    for values in ("infinite", "nan", "zeros"):
        yield _case((4, 9), 0, 20, 12, FP32, bias=True, values=values, tags={"adversarial"})
    yield _case((0, 0, 0), 0, 8, 4, FP32, bias=True, tags={"quick"})
    yield _case((3, 4), 0, 8, 0, FP32, bias=False, tags={"quick"})
    yield _case((3, 4), 2, 0, 8, FP32, bias=True, tags={"quick"})


def _case(
    counts: tuple[int, ...],
    rest: int,
    inner: int,
    outputs: int,
    dtype: torch.dtype,
    *,
    bias: bool,
    layout: str = "contiguous",
    values: str = "normal",
    tags: set[str],
) -> Case:
    experts, tokens = len(counts), sum(counts) + rest

    def build(generator: torch.Generator) -> tuple:
        x = _tensor((tokens, inner), layout, generator)
        if values == "zeros":
            x.zero_()
        elif values != "normal":
            x[0, 0] = float("inf" if values == "infinite" else "nan")
        w = _tensor((experts, outputs, inner), layout, generator) * max(inner, 1) ** -0.5
        if layout == "transposed":  # as gpt-oss holds its experts
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        b = torch.randn(experts, outputs, generator=generator).to(dtype) if bias else None
        return _cast(x, dtype), _cast(w, dtype), ends, b

    shape = "x".join(map(str, (tokens, inner, outputs)))
    name = f"{shape}-{experts}experts-{NAMES[dtype]}" + "-bias" * bias
    name += f"-{layout}" * (layout != "contiguous") + f"-{values}" * (values != "normal")
    return Case(name, dtype, build, frozenset(tags))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Another dtype, the same strides."""
    return x.to(dtype, memory_format=torch.preserve_format)


def _tensor(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> Tensor:
    if layout == "transposed":
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return torch.randn(swapped, generator=generator).transpose(-1, -2)
    if layout == "expanded":
        return torch.randn((1, *shape[1:]), generator=generator).expand(shape)
    if layout == "strided":
        return torch.randn((*shape[:-1], shape[-1] + 3), generator=generator)[..., 1:-2]
    return torch.randn(shape, generator=generator)
