"""linear_cross_entropy's CASES: a language model's head, awkward sizes, every option."""

import itertools
from collections.abc import Iterator

import torch

from fastllm.core.cases import Case
from fastllm.ops.loss.cases import BF16, FP16, FP32, FP64, NAMES, OPTIONS

SHAPES = ((1, 1, 1), (7, 5, 33), (40, 16, 300))
CHUNK = 4096  # bytes: several chunks in small cases


def cases() -> tuple[Case, ...]:
    """All cases of the op."""
    return tuple(_cases())


def _cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        yield _case((2048, 512, 32000), dtype, "mean", False, {"bench"}, 32 << 20)
    for dtype in (FP32, BF16):  # the first of each dtype has every argument
        yield _case((9, 8, 130), dtype, "all", True, {"quick"})
    flags = itertools.cycle((True, False))
    for shape, dtype in itertools.product(SHAPES, (FP32, BF16, FP16)):
        yield _case(shape, dtype, "mean", next(flags), {"quick"})
    for option in OPTIONS:
        yield _case((12, 8, 90), FP32, option, next(flags), {"quick"})
    for option in ("mean", "all"):
        yield _case((4, 3, 9), FP64, option, True, {"quick"})


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    option: str,
    full: bool,
    tags: set[str],
    chunk: int = CHUNK,
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        rows, features, classes = shape
        x = torch.randn((rows, features), generator=generator).to(dtype)
        w = (torch.randn((classes, features), generator=generator) / features**0.5).to(dtype)
        target = torch.randint(classes, (rows,), generator=generator)
        if rows > 2:
            target[1] = OPTIONS[option][0]
        bias = torch.randn(classes, generator=generator).to(dtype) if full else None
        weight = torch.rand(classes, generator=generator).to(dtype) if full else None
        low = torch.randn((rows, 3), generator=generator).to(dtype) if full else None
        up = (torch.randn((classes, 3), generator=generator) / 4).to(dtype) if full else None
        return (x, w, target, bias, weight, low, up, *OPTIONS[option][:6], chunk, 0.0, False)

    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}-{option}" + "-full" * full
    return Case(name, dtype, build, frozenset(tags))
