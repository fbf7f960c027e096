"""The losses on the CPU kernels (csrc/cpu/kernels/loss.inl): allocate, pass pointers."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty_like
from fastllm.ops.loss.spec import DIVERGENCES

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DIVERGENCES = {name: code for code, name in enumerate(DIVERGENCES)}
_threads = torch.get_num_threads


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError, as torch's, for the first target out of range. `target` is contiguous."""
    bad = _C.first_bad_target(target.data_ptr(), target.numel(), classes, ignore_index)
    if bad >= 0:
        raise IndexError(
            f"target: expected classes from 0 to {classes - 1} or ignore_index {ignore_index}, "
            f"found {target[bad].item()} in row {bad}"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    inplace_backward: bool,
    save_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, lse); target holds indices or, of input's dtype, probabilities.

    With save_gradient a list follows that holds the gradient for an upstream gradient of 1.
    """
    x, target = input.contiguous(), target.contiguous()
    rows, cols = x.shape
    soft = target.is_floating_point()
    if not soft:
        check_range(target, cols, ignore_index)
    w = _weight(weight)
    loss = x.new_empty((rows,) if reduction == "none" else ())
    lse = torch.empty((rows,), dtype=torch.float64)
    dx = empty_like(x) if save_gradient and reduction != "none" else None
    _C.cross_entropy_fwd(
        CODES[x.dtype], x.data_ptr(), 0 if soft else target.data_ptr(),
        target.data_ptr() if soft else 0, _ptr(w), loss.data_ptr(), lse.data_ptr(),
        _ptr(dx), rows, cols, ignore_index, _REDUCTIONS[reduction], label_smoothing, z_loss,
        logit_scale, softcap, _threads(),
    )  # fmt: skip
    return (loss, lse) if dx is None else (loss, lse, [dx])  # type: ignore[return-value]


def cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    gradient: list[Tensor] | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    inplace_backward: bool,
    save_gradient: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradient of input, in input's own memory if asked, and of probability targets."""
    if gradient:  # the first backward pass takes the one that forward made; others compute it
        made = gradient.pop()
        if needs == (True,) or not needs[1]:
            upstream = grad_loss.item()
            return (made if upstream == 1.0 else made.mul_(upstream), None)[: len(needs)]
    x, target = input.contiguous(), target.contiguous()
    rows, cols = x.shape
    soft = target.is_floating_point()
    g, w = grad_loss.to(torch.float32).contiguous(), _weight(weight)
    inplace = inplace_backward and x is input
    dx = (input if inplace else empty_like(x)) if needs[0] else None
    dq = empty_like(target) if soft and needs[1] else None
    _C.cross_entropy_bwd(
        CODES[x.dtype], x.data_ptr(), 0 if soft else target.data_ptr(),
        target.data_ptr() if soft else 0, _ptr(w), lse.data_ptr(), g.data_ptr(), _ptr(dx),
        _ptr(dq), rows, cols, ignore_index, _REDUCTIONS[reduction], label_smoothing, z_loss,
        logit_scale, softcap, _threads(),
    )  # fmt: skip
    if inplace and dx is not None:
        torch.autograd.graph.increment_version(input)
        dx = input.detach()
    return (dx, dq) if soft else (dx,)


def divergence(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss in float32, stats)."""
    s, t = student.contiguous(), teacher.contiguous()
    rows, cols = s.shape
    loss = torch.empty((rows,), dtype=torch.float32)
    stats = torch.empty((rows, 3), dtype=torch.float64)
    _C.distill_fwd(
        CODES[s.dtype], s.data_ptr(), t.data_ptr(), loss.data_ptr(), stats.data_ptr(), rows, cols,
        1.0 / temperature, _DIVERGENCES[divergence], _threads(),
    )  # fmt: skip
    return loss, stats


def divergence_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    divergence: str,
    temperature: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradient of the student's logits."""
    s, t = student.contiguous(), teacher.contiguous()
    rows, cols = s.shape
    g, ds = grad_loss.to(torch.float32).contiguous(), empty_like(s)
    _C.distill_bwd(
        CODES[s.dtype], s.data_ptr(), t.data_ptr(), stats.data_ptr(), g.data_ptr(), ds.data_ptr(),
        rows, cols, 1.0 / temperature, _DIVERGENCES[divergence], _threads(),
    )  # fmt: skip
    return (ds,)


def _weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().to(torch.float32).contiguous()


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- what is served


def _indices(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is not None and not tensor.is_cpu:
            return f"{name} on {tensor.device}: the kernels run on the CPU"
    if input.dtype not in CODES:
        return f"{input.dtype} input: computed by torch"
    return None if input.shape[1] else "no classes: computed by torch"


def _probs(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> str | None:
    if target.dtype != input.dtype:
        return f"{target.dtype} target with {input.dtype} input: computed by torch"
    return _indices(input, target, weight)


def _pair(student: Tensor, teacher: Tensor, *_: Any) -> str | None:
    if teacher.dtype != student.dtype:
        return f"{teacher.dtype} teacher with {student.dtype} student: computed by torch"
    return _indices(student, teacher, None)


BACKENDS: dict[str, Backend] = {
    "cross_entropy": Backend("cpu", cross_entropy, cross_entropy_backward, _indices),
    "cross_entropy_probs": Backend("cpu", cross_entropy, cross_entropy_backward, _probs),
    "divergence": Backend("cpu", divergence, divergence_backward, _pair),
}
