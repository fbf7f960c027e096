"""The contract of linear_distillation."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema
from fastllm.ops.linear_loss.spec import check_head
from fastllm.ops.loss.spec import DIVERGENCES, REDUCTIONS, require_indices

_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor teacher_hidden, Tensor teacher_weight, "
    "Tensor? target, Tensor? student_bias, Tensor? teacher_bias"
)
_OPTIONS = (
    "str divergence, float temperature, float alpha, int ignore_index, str reduction, "
    "int chunk_bytes, bool save_gradient"
)
SCHEMA = Schema(
    params=f"{_TENSORS}, {_OPTIONS}",
    returns="(Tensor, Tensor)",
    backward_params=f"Tensor grad_loss, {_TENSORS}, Tensor count, Tensor? gradient, {_OPTIONS}",
    backward_returns="(Tensor, Tensor, Tensor)",
)


class Options(NamedTuple):
    """The op's arguments after the tensors, in their order."""

    divergence: str
    temperature: float
    alpha: float
    ignore_index: int
    reduction: str
    chunk_bytes: int
    save_gradient: bool = False


def check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *options: Any,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    check_head(student_hidden, student_weight, student_bias, "student_", "student_hidden")
    check_head(teacher_hidden, teacher_weight, teacher_bias, "teacher_", "teacher_hidden")
    rows, classes = student_hidden.shape[0], student_weight.shape[0]
    if teacher_hidden.shape[0] != rows:
        raise ValueError(
            f"teacher_hidden: expected {rows} tokens, as student_hidden has, "
            f"found {teacher_hidden.shape[0]}"
        )
    if teacher_weight.shape[0] != classes:
        raise ValueError(
            f"teacher_weight: expected {classes} classes, as student_weight has, "
            f"found {teacher_weight.shape[0]}"
        )
    if target is not None:
        require_indices(target)
        if target.shape != (rows,):
            raise ValueError(f"target: expected shape [{rows}], found {list(target.shape)}")
    o = Options(*options)
    if o.divergence not in DIVERGENCES:
        raise ValueError(f"divergence: expected one of {DIVERGENCES}, found {o.divergence!r}")
    if not o.temperature > 0.0:
        raise ValueError(f"temperature: expected more than 0, found {o.temperature}")
    if o.reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, found {o.reduction!r}")
    if o.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected 1 or more, found {o.chunk_bytes}")


def fake(student_hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The loss, [tokens] or a scalar, and how many tokens count."""
    o = Options(*rest[6:])
    kind = torch.promote_types(student_hidden.dtype, torch.float32)
    shape = student_hidden.shape[:1] if o.reduction == "none" else ()
    count = student_hidden.new_empty((), dtype=torch.float64)
    return student_hidden.new_empty(shape, dtype=kind), count


def fake_backward(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    student_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of the student's hidden states, weight and bias."""
    return tuple(
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (student_hidden, student_weight, student_bias)
    )


def cost(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, *rest: Any
) -> Cost:
    """Two products forward, two backward; what is given moves once."""
    teacher_weight = rest[0]
    given = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    size = sum(t.numel() for t in given) * student_hidden.element_size()
    one = 2 * student_hidden.shape[0] * student_weight.numel()
    other = 2 * teacher_hidden.shape[0] * teacher_weight.numel()
    return Cost(size, size, one + other, 2 * one)
