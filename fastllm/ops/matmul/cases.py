"""The matmul family's CASES: real shapes worth timing, awkward ones worth testing."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.matmul.spec import ACTIVATIONS

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

# (M, K, N) of the blocks of language models, from one decoded token to a long batch
BENCH = ((1, 4096, 11008), (16, 4096, 11008), (2048, 512, 1408), (2048, 2048, 2048))
# one of everything, every remainder of a tile, more than one block of K, tall, thin and empty
SHAPES = (
    (1, 1, 1), (1, 70, 33), (2, 129, 50), (4, 64, 17), (5, 31, 40), (17, 3, 5), (33, 64, 65),
    (64, 300, 48), (7, 1100, 9), (130, 40, 31), (3, 0, 4), (0, 5, 3),
)  # fmt: skip
LAYOUTS = ("transposed", "expanded", "strided")

Build = Callable[[torch.Generator], tuple]


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op of the family."""
    if op == "matmul":
        return tuple(_matmuls())
    return tuple(_gated(op) if op.startswith("gated") else _linears(op))


def _linears(op: str) -> Iterator[Case]:
    if op == "linear":
        for shape, dtype in itertools.product(BENCH, (FP32, BF16, FP16)):
            yield _linear(shape, dtype, None, "none", tags={"bench"})
    options = itertools.cycle(
        itertools.product(("both", "bias", "none", "residual"), (*ACTIVATIONS, None))
    )
    for shape, dtype in itertools.product(SHAPES, (FP32, BF16, FP16)):
        params, activation = next(options)
        if shape == (1, 1, 1):  # one element: who is nearer is luck
            activation = None
        if shape == (33, 64, 65):  # one with everything in each dtype
            params, activation = "both", "gelu"
        yield _linear(shape, dtype, activation, params)
    for layout, dtype in itertools.product(LAYOUTS, (FP32, BF16)):
        yield _linear((24, 40, 56), dtype, "silu", "both", layout)
    for activation in ACTIVATIONS:
        yield _linear((3, 4, 5), FP64, activation, "both")
    yield _linear((6, 8, 4), FP32, "gelu_tanh", "both", "3d")


def _gated(op: str) -> Iterator[Case]:
    if op == "gated_linear":
        for dtype in (FP32, BF16, FP16):
            yield _pair((2048, 512, 1408), dtype, "silu", tags={"bench"})
    names = itertools.cycle(ACTIVATIONS)
    for shape, dtype in itertools.product(SHAPES[1::2], (FP32, BF16, FP16)):
        yield _pair(shape, dtype, next(names))
    for activation in ACTIVATIONS:
        yield _pair((3, 4, 5), FP64, activation)
        yield _pair((70, 36, 44), FP32, activation)


def _matmuls() -> Iterator[Case]:
    shapes = (
        ((3, 5, 6), (6,)), ((5, 7), (7, 3)), ((2, 3, 9, 17), (2, 3, 17, 20)),
        ((6, 33, 16), (16, 21)), ((4, 1, 8, 40), (3, 40, 8)), ((9,), (9,)), ((7,), (2, 7, 4)),
        ((65, 130), (130, 35)), ((2, 0, 3), (2, 3, 4)), ((1, 300), (300, 90)),
    )  # fmt: skip
    for (a, b), dtype in itertools.product(shapes, (FP32, BF16, FP16)):
        yield _matmul(a, b, dtype)
    for layout in LAYOUTS:
        yield _matmul((3, 20, 24), (3, 24, 18), FP32, layout)
    yield _matmul((2, 3, 4), (4, 2), FP64)
    yield _matmul((8, 512, 64), (8, 64, 512), FP32, tags={"bench"})


def _linear(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str | None,
    params: str,
    layout: str = "contiguous",
    tags: set[str] = frozenset({"quick"}),  # type: ignore[assignment]
) -> Case:
    m, k, n = shape
    lead = (2, m) if layout == "3d" else (m,)

    def build(generator: torch.Generator) -> tuple:
        x = _tensor((*lead, k), dtype, layout, generator)
        w = _weight((n, k), dtype, layout, generator)
        b = _tensor((n,), dtype, "", generator) if params in ("both", "bias") else None
        r = None
        if params in ("both", "residual"):
            r = _tensor((*lead, n), dtype, layout, generator)
        return x, w, b, r, activation

    parts = ["x".join(map(str, shape)), NAMES[dtype], activation or "plain", params]
    return Case("-".join([*parts, layout]), dtype, build, frozenset(tags))


def _pair(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    activation: str,
    tags: set[str] = frozenset({"quick"}),  # type: ignore[assignment]
) -> Case:
    m, k, n = shape

    def build(generator: torch.Generator) -> tuple:
        x = _tensor((m, k), dtype, "", generator)
        gate, up = (_weight((n, k), dtype, "", generator) for _ in range(2))
        return x, gate, up, activation

    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}-{activation}"
    return Case(name, dtype, build, frozenset(tags))


def _matmul(
    a: tuple[int, ...],
    b: tuple[int, ...],
    dtype: torch.dtype,
    layout: str = "contiguous",
    tags: set[str] = frozenset({"quick"}),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        return _tensor(a, dtype, layout, generator), _tensor(b, dtype, layout, generator)

    name = "-".join("x".join(map(str, s)) for s in (a, b))
    return Case(f"{name}-{NAMES[dtype]}-{layout}", dtype, build, frozenset(tags))


def _weight(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator
) -> Tensor:
    """Scaled so that products stay of the size of their inputs."""
    return _tensor(shape, dtype, layout, generator) * max(shape[-1], 1) ** -0.5


def _tensor(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator
) -> Tensor:
    if layout == "transposed":
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return torch.randn(swapped, generator=generator).to(dtype).transpose(-1, -2)
    if layout == "expanded":
        return torch.randn((1, *shape[1:]), generator=generator).to(dtype).expand(shape)
    if layout == "strided":
        wide = torch.randn((*shape[:-1], shape[-1] + 3), generator=generator).to(dtype)
        return wide[..., 1:-2]
    return torch.randn(shape, generator=generator).to(dtype)
