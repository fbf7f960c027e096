"""CASES of softmax and log_softmax: attention rows, vocabularies, inner dimensions."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
# every remainder of a vector, blocks past the first, dimensions behind the one that is summed over
SHAPES = (
    ((5, 7), -1), ((), 0), ((33, 255), 1), ((3, 4097), -1), ((2, 33000), -1), ((3, 9, 70), 1),
    ((40, 33), 0), ((2, 130, 3), 1), ((4, 0, 3), 0), ((4, 0, 3), 1), ((1, 1), 1),
)  # fmt: skip
BENCH = (((512, 32000), -1), ((8192, 512), -1), ((8, 256, 4096), 1))


def cases() -> tuple[Case, ...]:
    """All cases of either op."""
    return tuple(itertools.chain(_bench(), _test()))


def _bench() -> Iterator[Case]:
    for (shape, dim), dtype in itertools.product(BENCH, (FP32, BF16)):
        yield _case(shape, dim, dtype, tags={"bench"})


def _test() -> Iterator[Case]:
    for (shape, dim), dtype in itertools.product(SHAPES, (FP32, BF16, FP16)):
        yield _case(shape, dim, dtype, tags={"quick"})
    yield _case((4, 9), 1, FP64, tags={"quick"})
    for values, dtype, dim in itertools.product(VALUES, (FP32, BF16), (0, 1)):
        yield _case((24, 130), dim, dtype, values, tags={"adversarial"})
    for dtype in (FP32, BF16):
        yield _case((4, 40000), 1, dtype, "rising", tags={"adversarial"})
    for layout in ("transposed", "expanded"):
        yield _case((24, 130), 1, FP32, layout, tags={"quick"})


VALUES = ("equal", "large", "masked", "nan", "infinite")


def _case(
    shape: tuple[int, ...],
    dim: int,
    dtype: torch.dtype,
    values: str = "normal",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        return (_tensor(shape, values, generator).to(dtype), dim)

    name = f"{'x'.join(map(str, shape)) or 'scalar'}-dim{dim}-{NAMES[dtype]}"
    return Case(name + f"-{values}" * (values != "normal"), dtype, build, frozenset(tags))


def _tensor(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    if values == "transposed":
        return torch.randn(shape[::-1], generator=generator).t()
    if values == "expanded":
        return torch.randn(shape[1:], generator=generator).expand(shape)
    x = torch.randn(shape, generator=generator) * 2
    if values == "equal":
        x.fill_(3.25)
    elif values == "large":
        x *= 100
    elif values == "masked":
        x[torch.rand(shape, generator=generator) < 0.4] = -float("inf")
        x[0, :], x[:, 0] = 1.0, 1.0
    elif values == "rising":
        x += torch.linspace(-300, 250, shape[1]) * torch.linspace(0.02, 1, shape[0]).unsqueeze(1)
        x[:, : shape[1] // 3] = -float("inf")
    elif values == "nan":
        x[1, 2] = float("nan")
    elif values == "infinite":
        x[1, 2] = float("inf")
    return x
