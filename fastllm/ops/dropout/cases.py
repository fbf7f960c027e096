"""dropout_add's CASES: every remainder of a vector, several parts and rows of the mask."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
SEED = 0x1234_5678_9ABC
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (3, 7), (2, 3, 64), (33, 255), (2, 16400), (3, 12000))


def cases() -> tuple[Case, ...]:
    """All cases."""
    return tuple(_cases())


def _cases() -> Iterator[Case]:
    chances = itertools.cycle((0.1, 0.5, 0.9))
    for shape, dtype in itertools.product(SHAPES, (FP32, BF16, FP16)):
        yield _case(shape, dtype, next(chances))
    for p, dtype in itertools.product((0.0, 1.0), (FP32, BF16)):
        yield _case((5, 130), dtype, p)
    for layout in ("transposed", "expanded"):
        yield _case((24, 130), FP32, 0.3, layout)
    for value in (float("inf"), float("nan")):
        yield _case((5, 130), FP32, 0.3, value=value)
    yield _case((4, 9), FP64, 0.4)
    for shape in ((0, 4), ()):
        yield _case(shape, FP32, 0.4)


def _case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    p: float,
    layout: str = "plain",
    value: float | None = None,
) -> Case:
    def tensor(generator: torch.Generator) -> Tensor:
        if layout == "transposed":
            return torch.randn(shape[::-1], generator=generator).t()
        if layout == "expanded":
            return torch.randn(shape[1:], generator=generator).expand(shape)
        made = torch.randn(shape, generator=generator)
        if value is not None:
            made[1, 2] = value
        return made

    def build(generator: torch.Generator) -> tuple:
        input, residual = (tensor(generator).to(dtype) for _ in range(2))
        return input, residual, torch.tensor([SEED]), p

    parts = ["x".join(map(str, shape)) or "scalar", NAMES[dtype], f"p{p:g}"]
    parts += [layout] * (layout != "plain") + ([] if value is None else [f"{value:g}"])
    tags = {"quick"} if value is None else {"adversarial"}
    return Case("-".join(parts), dtype, build, frozenset(tags))
