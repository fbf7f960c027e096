"""The losses' contract: schemas, argument checks, fake kernels, costs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

REDUCTIONS = ("none", "mean", "sum")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")


class Options(NamedTuple):
    """What cross entropy is asked for: the op's arguments after the tensors, in their order."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    inplace_backward: bool = False
    save_gradient: bool = False


_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, "
    "float logit_scale, bool inplace_backward, bool save_gradient"
)
_ROWS = "Tensor input, Tensor target, Tensor? weight"
SCHEMAS = {
    "cross_entropy": Schema(
        params=f"{_ROWS}, {_OPTIONS}",
        returns="(Tensor, Tensor)",
        backward_params=f"Tensor grad_loss, {_ROWS}, Tensor lse, Tensor? gradient, {_OPTIONS}",
        backward_returns="Tensor",
    ),
    "cross_entropy_probs": Schema(
        params=f"{_ROWS}, {_OPTIONS}",
        returns="(Tensor, Tensor)",
        backward_params=f"Tensor grad_loss, {_ROWS}, Tensor lse, Tensor? gradient, {_OPTIONS}",
        backward_returns="(Tensor, Tensor)",
    ),
    "divergence": Schema(
        params="Tensor student, Tensor teacher, str divergence, float temperature",
        returns="(Tensor, Tensor)",
        backward_params=(
            "Tensor grad_loss, Tensor student, Tensor teacher, Tensor stats, str divergence, "
            "float temperature"
        ),
        backward_returns="Tensor",
    ),
}


# ---- arguments


def require_float(name: str, value: Any) -> None:
    """TypeError that names the argument, unless it is a tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, found {describe(value)}")


def check_options(options: Options) -> None:
    """ValueError that names the option that is out of its range."""
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, found {options.reduction!r}")
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected 0 to 1, found {options.label_smoothing}")
    if options.softcap < 0.0:
        raise ValueError(f"softcap: expected 0 (off) or more, found {options.softcap}")


def require_indices(target: Any) -> None:
    """TypeError unless target is an int64 tensor."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        found = describe(target) if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected an int64 Tensor of class indices, found {found}")


def check_indices(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> None:
    """Raises where torch would: the message names the argument."""
    _check_input(input, weight)
    require_indices(target)
    if target.dim() != 1 or target.size(0) != input.size(0):
        raise ValueError(
            f"target: expected shape [{input.size(0)}], one class a row of input "
            f"{list(input.shape)}, found {list(target.shape)}"
        )
    check_options(Options(*options))


def check_probs(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> None:
    """As check_indices, for targets that are probabilities."""
    _check_input(input, weight)
    require_float("target", target)
    if target.shape != input.shape:
        raise ValueError(
            f"target: expected probabilities of input's shape {list(input.shape)}, "
            f"found {list(target.shape)}"
        )
    check_options(Options(*options))


def check_divergence(student: Tensor, teacher: Tensor, divergence: str, temperature: float) -> None:
    """Raises for logits of two shapes and for options that are unknown."""
    require_float("student", student)
    require_float("teacher", teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"teacher: expected the student's shape {list(student.shape)}, two dimensions, "
            f"found {list(teacher.shape)}"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, found {divergence!r}")
    if not temperature > 0.0:
        raise ValueError(f"temperature: expected more than 0, found {temperature}")


def _check_input(input: Tensor, weight: Tensor | None) -> None:
    require_float("input", input)
    if input.dim() != 2:
        raise ValueError(f"input: expected [rows, classes], found {list(input.shape)}")
    if weight is None:
        return
    require_float("weight", weight)
    if weight.dim() != 1 or weight.size(0) != input.size(1):
        raise ValueError(
            f"weight: expected shape [{input.size(1)}], one value a class, "
            f"found {list(weight.shape)}"
        )


def mean_divisor(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean divides by: the rows that count, or the weights of their classes."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    inside = target.clamp(0, weight.numel() - 1)
    return torch.where(kept, weight[inside].to(torch.float64), 0).sum()


Why = Callable[..., str | None]


def supports(rows: Why) -> dict[str, Why]:
    """supports() of the family's ops by name, out of a backend's own for rows and class indices."""

    def probs(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
        if target.dtype != input.dtype:
            return f"{target.dtype} target with {input.dtype} input: computed by torch"
        return rows(input, target, weight)

    def pair(student: Tensor, teacher: Tensor, *_: Any) -> str | None:
        if teacher.dtype != student.dtype:
            return f"{teacher.dtype} teacher with {student.dtype} student: computed by torch"
        return rows(student, teacher, None)

    return {"cross_entropy": rows, "cross_entropy_probs": probs, "divergence": pair}


# ---- fake kernels


def fake_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str, *_: Any
) -> tuple[Tensor, Tensor]:
    """The loss, [rows] or a scalar, and the rows' log-sum-exp in float64."""
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == "none" else ())
    return loss, input.new_empty((rows,), dtype=torch.float64)


def fake_indices_backward(input: Tensor, *_: Any) -> tuple:
    """The gradient of input."""
    return (torch.empty_like(input, memory_format=torch.contiguous_format),)


def fake_probs_backward(input: Tensor, target: Tensor, *_: Any) -> tuple:
    """The gradients of input and target."""
    return (*fake_indices_backward(input), *fake_indices_backward(target))


def fake_divergence(student: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The rows' divergence, and what their gradients need."""
    rows = student.shape[0]
    kind = torch.promote_types(student.dtype, torch.float32)
    stats = student.new_empty((rows, 3), dtype=torch.float64)
    return student.new_empty((rows,), dtype=kind), stats


# ---- costs


def cost_rows(input: Tensor, *_: Any) -> Cost:
    """Forward reads the logits, backward reads them and writes the gradient."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(size, 2 * size, 4 * n, 5 * n)


def cost_pairs(input: Tensor, *_: Any) -> Cost:
    """As cost_rows, with a second matrix of the same shape to be read."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(2 * size, 3 * size, 10 * n, 10 * n)
