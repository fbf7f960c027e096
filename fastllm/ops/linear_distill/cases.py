"""linear_distillation's CASES: heads of two widths, every divergence, with and without targets."""

import itertools
from collections.abc import Iterator

import torch

from fastllm.core.cases import Case
from fastllm.ops.loss.cases import BF16, FP16, FP32, FP64, IGNORE, NAMES
from fastllm.ops.loss.spec import DIVERGENCES

SHAPES = ((1, 1, 2, 1), (7, 5, 3, 33), (40, 16, 24, 300))
CHUNK = 4096  # bytes: several chunks in small cases


def cases() -> tuple[Case, ...]:
    """All cases of the op."""
    return tuple(_cases())


def _cases() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        yield _case((2048, 256, 512, 32000), dtype, "forward_kl", True, {"bench"}, chunk=32 << 20)
    for dtype in (FP32, BF16):  # the first of each dtype has every argument
        yield _case((9, 8, 12, 130), dtype, "jsd", True, {"quick"}, "none")
    kinds, flags = itertools.cycle(DIVERGENCES), itertools.cycle((True, False, False))
    for shape, dtype in itertools.product(SHAPES, (FP32, BF16, FP16)):
        yield _case(shape, dtype, next(kinds), next(flags), {"quick"})
    reductions = itertools.cycle(("sum", "none", "mean"))
    for kind in DIVERGENCES:
        yield _case((12, 8, 8, 90), FP32, kind, next(flags), {"quick"}, next(reductions))
        yield _case((4, 3, 2, 9), FP64, kind, True, {"quick"})


def _case(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    kind: str,
    full: bool,
    tags: set[str],
    reduction: str = "mean",
    chunk: int = CHUNK,
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        rows, *features, classes = shape

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        heads = []
        for count in features:
            heads += [normal(rows, count), 2 * normal(classes, count) / count**0.5]
        target: torch.Tensor | None = None
        biases: tuple = (None, None)
        if full:
            target = torch.randint(classes, (rows,), generator=generator)
            if rows > 2:
                target[1] = IGNORE
            biases = (normal(classes).to(dtype), normal(classes).to(dtype))
        options = (kind, 2.0, 0.7, IGNORE, reduction, chunk, False)
        return (*(t.to(dtype) for t in heads), target, *biases, *options)

    name = f"{'x'.join(map(str, shape))}-{NAMES[dtype]}-{kind}-{reduction}" + "-full" * full
    return Case(name, dtype, build, frozenset(tags))
