"""linear_distillation in plain torch: any float dtype, differentiable, in float64 the oracle."""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.linear_distill.spec import Options
from fastllm.ops.linear_loss.reference import head_gradients, logits_of
from fastllm.ops.loss import reference
from fastllm.ops.loss.reference import wide


def counted(target: Tensor | None, rows: int, ignore_index: int, like: Tensor) -> Tensor:
    """How many tokens count, in float64."""
    if target is None:
        return torch.full((), float(rows), dtype=torch.float64, device=like.device)
    return (target != ignore_index).sum().double()


def linear_distillation(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """alpha T^2 D(teacher, student) + (1 - alpha) cross entropy; without targets T^2 D."""
    o = Options(*options)
    s = logits_of(student_hidden, student_weight, student_bias, None, None)
    t = logits_of(teacher_hidden, teacher_weight, teacher_bias, None, None)
    losses = reference.divergence(s, t, o.divergence, o.temperature)[0] * o.temperature**2
    if target is not None:
        plain = (o.ignore_index, "none", 0.0, 0.0, 0.0, 1.0)
        hard = reference.cross_entropy(s, target, None, *plain)[0]
        soft = torch.where(target != o.ignore_index, losses, 0)
        losses = o.alpha * soft + (1.0 - o.alpha) * hard
    count = counted(target, s.shape[0], o.ignore_index, s)
    if o.reduction != "none":
        losses = losses.double().sum()
    if o.reduction == "mean":
        losses = losses / count
    return losses.to(wide(student_hidden).dtype), count


def linear_distillation_backward(
    grad_loss: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    count: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dX = dL W, dW = dL^T X, db = sum of dL, with dL the gradient of the student's logits."""
    o, needs = Options(*rest[:-1]), rest[-1]
    s = logits_of(student_hidden, student_weight, student_bias, None, None)
    t = logits_of(teacher_hidden, teacher_weight, teacher_bias, None, None)
    g = grad_loss.to(s.dtype)
    if o.reduction == "mean":
        g = g / count
    g = g.expand(s.shape[0]).to(s.dtype)
    kept = None if target is None else target != o.ignore_index
    alpha = 1.0 if target is None else o.alpha
    soft = g * (alpha * o.temperature**2)
    soft = soft if kept is None else torch.where(kept, soft, 0)
    (d,) = reference.divergence_backward(soft, s, t, s, o.divergence, o.temperature, (True,))
    assert isinstance(d, Tensor)
    if target is not None and kept is not None:
        plain = (o.ignore_index, "none", 0.0, 0.0, 0.0, 1.0, False, False)
        hard = reference.cross_entropy_backward(
            g * (1.0 - alpha), s, target, None, s, None, *plain, (True,)
        )[0]
        assert isinstance(hard, Tensor)
        d = torch.where(kept.unsqueeze(-1), d, 0) + hard
    head = (student_hidden, student_weight, student_bias, None, None)
    return head_gradients(d, head, (*needs, False, False))[:3]
