"""linear_distillation_loss: a student's and a teacher's head and the loss between them, fused."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.ops.linear_distill import chunked, reference, spec
from fastllm.ops.linear_distill.cases import cases
from fastllm.ops.loss import reduced, stock
from fastllm.ops.loss.spec import require_float


def _stock(*args: Any) -> Tensor:
    """F.linear for both heads, F.kl_div and its like, F.cross_entropy."""
    s_hidden, s_weight, t_hidden, t_weight, target, s_bias, t_bias, *options = args
    o = spec.Options(*options)
    s = F.linear(s_hidden, s_weight, s_bias)
    t = F.linear(t_hidden, t_weight, t_bias).detach()
    losses = stock.divergence(s, t, o.divergence, o.temperature) * o.temperature**2
    if target is None:
        return reduced(losses, None, o.reduction, losses.shape)
    kept = target != o.ignore_index
    hard = F.cross_entropy(s, target, ignore_index=o.ignore_index, reduction="none")
    losses = torch.where(kept, losses, 0) * o.alpha + (1.0 - o.alpha) * hard.to(losses.dtype)
    return reduced(losses, kept, o.reduction, losses.shape)


def _serves(student_hidden: Tensor, *_: Any) -> None:
    require_float("student_hidden", student_hidden)


linear_distillation_op = define(
    "linear_distillation",
    (*chunked.BACKENDS, Backend("torch", _stock, supports=_serves)),
    reference,
    family="loss",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3, 4, 5, 6),
    saved=lambda args, out: (*args[:7], out[1], out[2] if len(out) > 2 else None, *args[7:]),
    saved_tensors=(0, 1, 2, 3, 4, 5, 6, 7),
    forward_args=lambda saved: (*saved[:7], *saved[9:]),
    gradients={0: 0, 1: 1, 5: 2},
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    hidden=1,
    cost=spec.cost,
    cases=cases(),
    autocast_composite=("cpu", "cuda"),
)


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_bytes: int = 32 << 20,
    backend: str | None = None,
) -> Tensor:
    """distillation_loss of two heads, with at most chunk_bytes of logits of both together.

    student_hidden  [..., H], student_weight [C, H], student_bias [C] or None; the teacher's are of
                    a width of their own, of as many tokens and classes, and get no gradient
    target          [...] class indices, or None: the divergence alone, as if alpha were 1
    temperature, alpha, divergence, ignore_index, reduction  as in `distillation_loss`: the result
                    is alpha T^2 D(teacher, student) + (1 - alpha) cross entropy (Hinton et al.
                    2015), and means are over the tokens that count
    chunk_bytes     bound on the logits that exist at once (never less than one token's); beyond it
                    there are the gradients, that of the weight in float32

    Returns float32 (float64 for float64 states), reduced or of target's shape. Raises ValueError or
    TypeError for arguments that do not fit, IndexError for a class out of range on the CPU.
    """
    heads: list[Any] = [student_hidden, student_weight, teacher_hidden, teacher_weight]
    names = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
    for name, tensor in zip(names, heads, strict=True):
        require_float(name, tensor)
    tensors = [*heads, student_bias, teacher_bias]
    kind = casting(student_hidden)
    if kind is not None:
        *heads, student_bias, teacher_bias = cast(kind, *tensors)
        with torch.autocast(kind, enabled=False):
            return linear_distillation_loss(
                heads[0], heads[1], heads[2], heads[3], target, student_bias=student_bias,
                teacher_bias=teacher_bias, temperature=temperature, alpha=alpha,
                divergence=divergence, ignore_index=ignore_index, reduction=reduction,
                chunk_bytes=chunk_bytes, backend=backend,
            )  # fmt: skip
    shape = student_hidden.shape[:-1]
    for name, found in (("teacher_hidden", teacher_hidden.shape[:-1]), ("target", None)):
        found = target.shape if name == "target" and isinstance(target, Tensor) else found
        if found is not None and found != shape:
            raise ValueError(
                f"{name}: expected the tokens of student_hidden, {list(shape)}, found {list(found)}"
            )
    save_gradient = (
        reduction != "none"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(t is not None and t.requires_grad for t in tensors)
    )
    loss = linear_distillation_op(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_weight,
        teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]),
        teacher_weight.detach(),
        target.reshape(-1) if isinstance(target, Tensor) else target,
        student_bias,
        None if teacher_bias is None else teacher_bias.detach(),
        divergence,
        float(temperature),
        float(alpha),
        ignore_index,
        reduction,
        int(chunk_bytes),
        save_gradient,
        backend=backend,
    )
    return loss.reshape(shape) if reduction == "none" else loss
