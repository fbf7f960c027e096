"""The losses in Triton: fastllm.kernels.loss, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.loss.spec import Options, mean_divisor, supports
from fastllm.ops.norm.gpu import DTYPES, MAX_COLS
from fastllm.ops.norm.triton import _interpreted, available

_loaded: Any = None


def _kernels() -> Any:
    global _loaded
    if _loaded is None:
        _loaded = importlib.import_module("fastllm.kernels.loss")
    return _loaded


def _settings(o: Options) -> tuple:
    return o.ignore_index, o.label_smoothing, o.z_loss, o.softcap, o.logit_scale


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """(loss, lse). A target out of range makes its loss NaN: an exception would need a sync."""
    o = Options(*options)
    losses, shares, lse = _kernels().cross_entropy_fwd(
        input.contiguous(), target.contiguous(), weight, *_settings(o)
    )
    if o.reduction == "mean":
        losses = losses.sum() / shares.sum()
    elif o.reduction == "sum":
        losses = losses.sum()
    return losses.to(input.dtype), lse


def cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """The gradient of input, in input's own memory if asked, and of probability targets."""
    o, needs = Options(*rest[:-1]), rest[-1]
    x, target = input.contiguous(), target.contiguous()
    soft = target.is_floating_point()
    g = grad_loss.to(torch.float32)
    if o.reduction == "mean":
        g = g / (x.shape[0] if soft else mean_divisor(target, weight, o.ignore_index))
    if o.reduction != "none":
        g = g.expand(x.shape[0])
    inplace = o.inplace_backward and x is input
    dx = (input.detach() if inplace else torch.empty_like(x)) if needs[0] else None
    dq = torch.empty_like(target) if soft and needs[1] else None
    _kernels().cross_entropy_bwd(x, target, weight, lse, g.contiguous(), dx, dq, *_settings(o))
    if inplace and dx is not None:
        torch.autograd.graph.increment_version(input)
    return (dx, dq) if soft else (dx,)


# ---- for heads that are computed in parts: as in cpu.py


def prepared(weight: Tensor | None) -> Tensor | None:
    """Class weights as the kernels read them."""
    return None if weight is None else weight.detach().contiguous()


def part_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, o: Options, first: int, classes: int
) -> tuple[Tensor, Tensor]:
    """(losses, lse) of the rows' classes from `first` on: see _cross_entropy_fwd_kernel."""
    losses, _, lse = _kernels().cross_entropy_fwd(
        logits, target, weight, *_settings(o), part=(first, classes)
    )
    return losses, lse


def part_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    o: Options,
    first: int,
    classes: int,
) -> None:
    """Replaces the logits by their gradient; grad is float32 [rows], lse that of whole rows."""
    _kernels().cross_entropy_bwd(
        logits, target, weight, lse, grad.contiguous(), logits, None, *_settings(o),
        part=(first, classes),
    )  # fmt: skip


def both_in_place(
    logits: Tensor, target: Tensor, weight: Tensor | None, o: Options, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(losses, lse); whole rows of logits are replaced by their gradient, all with `upstream`."""
    losses, _, lse = _kernels().cross_entropy_fwd(logits, target, weight, *_settings(o))
    g = upstream.to(torch.float32).expand(logits.shape[0])
    part_backward(g, logits, target, weight, lse, o, 0, logits.shape[1])
    return losses, lse


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
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradient of the student's logits; in `out`, which may be student or teacher."""
    grad = _kernels().distill_bwd(
        student.contiguous(),
        teacher.contiguous(),
        stats,
        grad_loss.to(torch.float32).contiguous(),
        divergence,
        temperature,
        out,
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


_WHY = supports(_indices)
BACKENDS: dict[str, Backend] = {
    key: Backend("triton", cross_entropy, cross_entropy_backward, _WHY[key], available)
    for key in ("cross_entropy", "cross_entropy_probs")
}
BACKENDS["divergence"] = Backend(
    "triton", divergence, divergence_backward, _WHY["divergence"], available
)
