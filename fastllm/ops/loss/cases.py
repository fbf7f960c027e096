"""The losses' CASES: real vocabularies worth timing, awkward sizes, hostile logits and targets."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.ops.loss.spec import DIVERGENCES

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16", FP64: "fp64"}
BENCH_SHAPES = ((512, 32000), (2048, 8192))
TEST_SHAPES = ((1, 1), (5, 7), (33, 255), (16, 1000), (3, 4097), (2, 33000))
IGNORE = -100

# ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, inplace_backward,
# save_gradient
PLAIN = (IGNORE, "mean", 0.0, 0.0, 0.0, 1.0, False, False)
OPTIONS = {
    "mean": PLAIN,
    "sum": (IGNORE, "sum", 0.0, 0.0, 0.0, 1.0, False, False),
    "none": (IGNORE, "none", 0.0, 0.0, 0.0, 1.0, False, False),
    "smooth": (IGNORE, "mean", 0.1, 0.0, 0.0, 1.0, False, False),
    "z": (IGNORE, "mean", 0.0, 1e-2, 0.0, 1.0, False, False),
    "cap": (IGNORE, "none", 0.0, 0.0, 30.0, 1.0, False, False),
    "scale": (IGNORE, "sum", 0.0, 0.0, 0.0, 0.25, False, False),
    "all": (2, "none", 0.2, 1e-2, 5.0, 0.5, False, False),
}


def cases(op: str) -> tuple[Case, ...]:
    """All cases of one op of the family."""
    if op == "divergence":
        return tuple(itertools.chain(_bench(op), _pairs()))
    return tuple(itertools.chain(_bench(op), _rows(op)))


def _bench(op: str) -> Iterator[Case]:
    for shape, dtype in itertools.product(BENCH_SHAPES, (FP32, BF16)):
        if op == "divergence":
            yield _pair(shape, dtype, "forward_kl", 2.0, tags={"bench"})
        else:
            yield _case(op, shape, dtype, "mean", tags={"bench"})


def _rows(op: str) -> Iterator[Case]:
    options = itertools.cycle(OPTIONS)
    weights = itertools.cycle((True, False, False, False))
    for dtype in (FP32, BF16):  # the first of each dtype has every argument
        yield _case(op, (6, 130), dtype, "all", True, tags={"quick"})
    for shape, dtype in itertools.product(TEST_SHAPES, (FP32, BF16, FP16)):
        yield _case(op, shape, dtype, next(options), next(weights), tags={"quick"})
    for option in OPTIONS:
        yield _case(op, (7, 90), FP32, option, True, tags={"quick"})
        yield _case(op, (7, 90), BF16, option, tags={"quick"})
    for option in ("mean", "all"):
        yield _case(op, (4, 9), FP64, option, True, tags={"quick"})
    yield _case(op, (6, 80), FP32, "none", values="strided", tags={"quick"})
    hostile = ("sure", "equal", "large", "masked")
    for values, dtype in itertools.product(hostile, (FP32, BF16)):
        for option in ("mean", "none"):
            yield _case(op, (5, 300), dtype, option, values=values, tags={"adversarial"})
    for option, dtype in itertools.product(("mean", "none"), (FP32, BF16)):
        yield _case(op, (4, 6500), dtype, option, values="rising", tags={"adversarial"})
    if op == "cross_entropy":
        for targets, dtype in itertools.product(("ignored", "last"), (FP32, BF16)):
            yield _case(op, (5, 70), dtype, "mean", targets=targets, tags={"adversarial"})
            yield _case(op, (5, 70), dtype, "sum", targets=targets, tags={"adversarial"})


def _pairs() -> Iterator[Case]:
    kinds = itertools.cycle(itertools.product(DIVERGENCES, (1.0, 2.5)))
    for shape, dtype in itertools.product(TEST_SHAPES, (FP32, BF16, FP16)):
        yield _pair(shape, dtype, *next(kinds), tags={"quick"})
    for kind in DIVERGENCES:
        yield _pair((7, 90), FP32, kind, 2.0, tags={"quick"})
        yield _pair((7, 90), BF16, kind, 0.5, tags={"quick"})
        yield _pair((3, 8), FP64, kind, 1.5, tags={"quick"})
        yield _pair((5, 300), FP32, kind, 1.0, values="large", tags={"adversarial"})
        yield _pair((5, 300), FP32, kind, 1.0, values="masked", tags={"adversarial"})


def _case(
    op: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    option: str,
    weighted: bool = False,
    values: str = "normal",
    targets: str = "some",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        rows, classes = shape
        x = _logits(shape, values, generator).to(dtype)
        weight = torch.rand(classes, generator=generator).to(dtype) if weighted else None
        ignore = OPTIONS[option][0]
        if op == "cross_entropy_probs":
            other = torch.randn(shape, generator=generator)
            other[x.isinf()] = -float("inf")
            target = other.softmax(-1).to(dtype)
            if values in ("masked", "rising"):  # 0 * -inf: of no use as a target
                x = x.clamp_min(-300.0)
        else:
            target = torch.randint(classes, (rows,), generator=generator)
            if values in ("sure", "masked", "rising"):
                target = x.argmax(-1)
            if rows > 2:
                target[1] = ignore
            if targets == "ignored":
                target[:] = ignore
            elif targets == "last":
                target[:-1] = ignore
        return (x, target, weight, *OPTIONS[option])

    name = f"{shape[0]}x{shape[1]}-{NAMES[dtype]}-{option}" + "-weight" * weighted
    name += f"-{values}" * (values != "normal") + f"-{targets}" * (targets != "some")
    return Case(name, dtype, build, frozenset(tags))


def _pair(
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: str,
    temperature: float,
    values: str = "normal",
    tags: set[str] = frozenset(),  # type: ignore[assignment]
) -> Case:
    def build(generator: torch.Generator) -> tuple:
        student = _logits(shape, values, generator)
        teacher = _logits(shape, values, generator)
        if values == "masked":
            teacher[student.isinf()] = -float("inf")
            student[teacher.isinf()] = -float("inf")
        return (student.to(dtype), teacher.to(dtype), kind, temperature)

    name = f"{shape[0]}x{shape[1]}-{NAMES[dtype]}-{kind}-t{temperature:g}"
    return Case(name + f"-{values}" * (values != "normal"), dtype, build, frozenset(tags))


def _logits(shape: tuple[int, int], values: str, generator: torch.Generator) -> Tensor:
    if values == "strided":
        return torch.randn((shape[0], shape[1] + 3), generator=generator)[:, 1:-2]
    x = torch.randn(shape, generator=generator) * 2
    if values == "sure":  # the true class' probability is 1 but for 1e-6 and less
        x[:, 3] += torch.linspace(14, 40, shape[0])
    elif values == "equal":
        x.fill_(3.25)
    elif values == "large":
        x = x.clamp(-3, 3) * 100
    elif values == "masked":
        x[torch.rand(shape, generator=generator) < 0.4] = -float("inf")
        x[:, 0] = 1.0
    elif values == "rising":  # what is subtracted has to be raised on the way, by more and by less
        x += torch.linspace(-300, 250, shape[1]) * torch.linspace(0.02, 1, shape[0]).unsqueeze(1)
        x[:, : shape[1] // 3] = -float("inf")
    return x
