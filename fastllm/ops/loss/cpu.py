"""The losses on the CPU kernels (csrc/cpu/kernels/loss.inl): allocate, pass pointers."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty_like
from fastllm.ops.loss.spec import DIVERGENCES, Options, supports

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
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    """(loss, lse); target holds indices or, of input's dtype, probabilities.

    With save_gradient a list follows that holds the gradient for an upstream gradient of 1.
    """
    o = Options(*options)
    x, target = input.contiguous(), target.contiguous()
    if not target.is_floating_point():
        check_range(target, x.shape[1], o.ignore_index)
    loss = x.new_empty((x.shape[0],) if o.reduction == "none" else ())
    dx = empty_like(x) if o.save_gradient and o.reduction != "none" else None
    _, lse = _forward(x, target, prepared(weight), o, loss, dx)
    return (loss, lse) if dx is None else (loss, lse, [dx])


def cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    gradient: list[Tensor] | None,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """The gradient of input, in input's own memory if asked, and of probability targets."""
    o, needs = Options(*rest[:-1]), rest[-1]
    if gradient:  # the first backward pass takes the one that forward made; others compute it
        made = gradient.pop()
        if needs == (True,) or not needs[1]:
            upstream = grad_loss.item()
            return (made if upstream == 1.0 else made.mul_(upstream), None)[: len(needs)]
    x, target = input.contiguous(), target.contiguous()
    soft = target.is_floating_point()
    inplace = o.inplace_backward and x is input
    dx = (input if inplace else empty_like(x)) if needs[0] else None
    dq = empty_like(target) if soft and needs[1] else None
    _backward(grad_loss.to(torch.float32), x, target, prepared(weight), lse, o, dx, dq)
    if inplace and dx is not None:
        torch.autograd.graph.increment_version(input)
        dx = input.detach()
    return (dx, dq) if soft else (dx,)


# ---- for heads that are computed in parts: indices are in range, logits and targets contiguous


def prepared(weight: Tensor | None) -> Tensor | None:
    """Class weights as the kernels read them."""
    return None if weight is None else weight.detach().to(torch.float32).contiguous()


def part_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, o: Options, first: int, classes: int
) -> tuple[Tensor, Tensor]:
    """(losses, lse), float64, of the rows' classes from `first` on; see CrossEntropy in loss.h."""
    return _forward(logits, target, weight, o, None, None, (first, classes))


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
    _backward(grad, logits, target, weight, lse, o, logits, None, (first, classes))


def both_in_place(
    logits: Tensor, target: Tensor, weight: Tensor | None, o: Options, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    """(losses, lse); whole rows of logits are replaced by their gradient, all with `upstream`."""
    o = o._replace(reduction="sum")
    return _forward(logits, target, weight, o, None, logits, upstream=upstream.item())


def _forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    o: Options,
    loss: Tensor | None,
    dx: Tensor | None,
    part: tuple[int, int] | None = None,
    upstream: float = 1.0,
) -> tuple[Tensor, Tensor]:
    losses = torch.empty(x.shape[:1], dtype=torch.float64)
    lse = torch.empty_like(losses)
    _C.cross_entropy_fwd(
        *_rows(x, target, weight), _ptr(loss), losses.data_ptr(), lse.data_ptr(), _ptr(dx),
        upstream, *x.shape, part is not None, *(part or (0, x.shape[1])), *_settings(o),
    )  # fmt: skip
    return losses, lse


def _backward(
    grad: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    o: Options,
    dx: Tensor | None,
    dq: Tensor | None,
    part: tuple[int, int] | None = None,
) -> None:
    g = grad.contiguous()
    _C.cross_entropy_bwd(
        *_rows(x, target, weight), lse.data_ptr(), g.data_ptr(), _ptr(dx), _ptr(dq), *x.shape,
        part is not None, *(part or (0, x.shape[1])), *_settings(o),
    )  # fmt: skip


def _rows(x: Tensor, target: Tensor, weight: Tensor | None) -> tuple:
    at = target.data_ptr()
    index, probs = (0, at) if target.is_floating_point() else (at, 0)
    return CODES[x.dtype], x.data_ptr(), index, probs, _ptr(weight)


def _settings(o: Options) -> tuple:
    return o.ignore_index, _REDUCTIONS[o.reduction], *o[2:6], _threads()


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# ---- divergences


def divergence(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """(loss in float32, stats)."""
    s, t = student.contiguous(), teacher.contiguous()
    loss = torch.empty(s.shape[:1], dtype=torch.float32)
    stats = torch.empty((s.shape[0], 3), dtype=torch.float64)
    _C.distill_fwd(
        CODES[s.dtype], s.data_ptr(), t.data_ptr(), loss.data_ptr(), stats.data_ptr(), *s.shape,
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
    out: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradient of the student's logits; in `out`, which may be student or teacher."""
    s, t = student.contiguous(), teacher.contiguous()
    g, ds = grad_loss.to(torch.float32).contiguous(), empty_like(s) if out is None else out
    _C.distill_bwd(
        CODES[s.dtype], s.data_ptr(), t.data_ptr(), stats.data_ptr(), g.data_ptr(), ds.data_ptr(),
        *s.shape, 1.0 / temperature, _DIVERGENCES[divergence], _threads(),
    )  # fmt: skip
    return (ds,)


# ---- what is served


def _indices(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is not None and not tensor.is_cpu:
            return f"{name} on {tensor.device}: the kernels run on the CPU"
    if input.dtype not in CODES:
        return f"{input.dtype} input: computed by torch"
    return None if input.shape[1] else "no classes: computed by torch"


_WHY = supports(_indices)
BACKENDS: dict[str, Backend] = {
    key: Backend("cpu", cross_entropy, cross_entropy_backward, _WHY[key])
    for key in ("cross_entropy", "cross_entropy_probs")
}
BACKENDS["divergence"] = Backend("cpu", divergence, divergence_backward, _WHY["divergence"])
