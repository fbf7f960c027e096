"""The losses in Triton: fastllm.kernels.loss, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import DTYPES, MAX_COLS
from fastllm.ops.norm.triton import _interpreted, available

_loaded: Any = None


def _kernels() -> Any:
    global _loaded
    if _loaded is None:
        _loaded = importlib.import_module("fastllm.kernels.loss")
    return _loaded


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
    """(loss, lse). A target out of range makes its loss NaN: an exception would need a sync."""
    losses, shares, lse = _kernels().cross_entropy_fwd(
        input.contiguous(), target.contiguous(), weight, ignore_index, label_smoothing, z_loss,
        softcap, logit_scale,
    )  # fmt: skip
    if reduction == "mean":
        losses = losses.sum() / shares.sum()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(input.dtype), lse


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
    x, target = input.contiguous(), target.contiguous()
    soft = target.is_floating_point()
    g = grad_loss.to(torch.float32)
    if reduction == "mean":
        g = g / (x.shape[0] if soft else _divisor(target, weight, ignore_index))
    if reduction != "none":
        g = g.expand(x.shape[0])
    inplace = inplace_backward and x is input
    dx = (input.detach() if inplace else torch.empty_like(x)) if needs[0] else None
    dq = torch.empty_like(target) if soft and needs[1] else None
    _kernels().cross_entropy_bwd(
        x, target, weight, lse, g.contiguous(), dx, dq, ignore_index, label_smoothing, z_loss,
        softcap, logit_scale,
    )  # fmt: skip
    if inplace and dx is not None:
        torch.autograd.graph.increment_version(input)
    return (dx, dq) if soft else (dx,)


def _divisor(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    inside = target.clamp(0, weight.numel() - 1)
    return torch.where(kept, weight[inside].to(torch.float32), 0).sum()


def divergence(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss in float32, stats)."""
    return _kernels().distill_fwd(
        student.contiguous(), teacher.contiguous(), divergence, temperature
    )


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
    grad = _kernels().distill_bwd(
        student.contiguous(),
        teacher.contiguous(),
        stats,
        grad_loss.to(torch.float32).contiguous(),
        divergence,
        temperature,
    )
    return (grad,)


def _indices(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    if input.device.type not in allowed:
        return f"input is on {input.device.type}"
    if input.dtype not in DTYPES:
        return f"{input.dtype} input: computed by torch"
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.device != input.device:
            return f"{name} on {tensor.device} with input on {input.device}"
    return None if 0 < input.shape[1] <= MAX_COLS else f"rows of {input.shape[1]} values"


def _probs(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    if target.dtype != input.dtype:
        return f"{target.dtype} target with {input.dtype} input: computed by torch"
    return _indices(input, target, weight)


def _pair(student: Tensor, teacher: Tensor, *_: Any) -> str | None:
    if teacher.dtype != student.dtype:
        return f"{teacher.dtype} teacher with {student.dtype} student: computed by torch"
    return _indices(student, teacher, None)


BACKENDS: dict[str, Backend] = {
    "cross_entropy": Backend("triton", cross_entropy, cross_entropy_backward, _indices, available),
    "cross_entropy_probs": Backend(
        "triton", cross_entropy, cross_entropy_backward, _probs, available
    ),
    "divergence": Backend("triton", divergence, divergence_backward, _pair, available),
}
