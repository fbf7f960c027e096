"""CASES of moe_permute and moe_unpermute."""

import itertools
from collections.abc import Iterator

import torch

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}

# (tokens, choices, hidden)
BENCH_SHAPES = ((512, 2, 1024), (512, 8, 1024))
TEST_SHAPES = ((5, 3, 17), (9, 2, 64), (33, 1, 40), (20, 8, 130), (3, 2, 1), (7, 4, 1500))


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one of the two."""
    return tuple(itertools.chain(_bench(op), _test(op)))


def _bench(op: str) -> Iterator[Case]:
    for shape, dtype in itertools.product(BENCH_SHAPES, (FP32, BF16)):
        yield _case(op, shape, dtype, dtype, tags={"bench"})


def _test(op: str) -> Iterator[Case]:
    for shape, dtype in itertools.product(TEST_SHAPES, (FP32, BF16, FP16)):
        yield _case(op, shape, dtype, dtype, tags={"quick"})
    yield _case(op, (4, 2, 3), FP64, FP64, tags={"quick"})
    for shape in ((0, 2, 8), (3, 2, 0)):
        yield _case(op, shape, FP32, FP32, tags={"quick"})
    for values in ("infinite", "nan"):
        yield _case(op, (6, 2, 24), FP32, FP32, values=values, tags={"adversarial"})
    if op == "moe_unpermute":
        for dtype in (BF16, FP16):  # Mixtral's routing weights stay in float32
            yield _case(op, (12, 3, 40), dtype, FP32, tags={"quick"})
        for dtype in (FP32, BF16, FP64):
            yield _case(op, (6, 3, 20), dtype, None, tags={"quick"})


def _case(
    op: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    weights: torch.dtype | None,
    values: str = "normal",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    tokens, choices, hidden = shape

    def build(generator: torch.Generator) -> tuple:
        many = tokens if op == "moe_permute" else tokens * choices
        x = torch.randn(many, hidden, generator=generator)
        if values != "normal":
            x[0, 0] = float("inf" if values == "infinite" else "nan")
        position = torch.randperm(tokens * choices, generator=generator)
        given = (x.to(dtype), position.view(tokens, choices))
        if op == "moe_permute":
            return given
        w = None
        if weights is not None:
            w = torch.rand(tokens, choices, generator=generator).to(weights)
        return (*given, w)

    kind = "" if op == "moe_permute" else f"-w{NAMES[weights] if weights else 'none'}"
    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}{kind}"
    return Case(name + f"-{values}" * (values != "normal"), dtype, build, frozenset(tags))
