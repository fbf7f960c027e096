"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.loss.spec import Options, require_float


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """F.cross_entropy of the logits, the z-loss added to each row as one would by hand."""
    o = Options(*options)
    s = input if o.logit_scale == 1.0 else input * o.logit_scale
    s = o.softcap * torch.tanh(s / o.softcap) if o.softcap else s
    if weight is not None:
        weight = weight.to(input.dtype)
    given: dict[str, Any] = {"label_smoothing": o.label_smoothing}
    if not target.is_floating_point():  # with probabilities, torch ignores nothing
        given["ignore_index"] = o.ignore_index
    if not o.z_loss:
        return F.cross_entropy(s, target, weight, reduction=o.reduction, **given)
    losses = F.cross_entropy(s, target, weight, reduction="none", **given)
    z = o.z_loss * s.logsumexp(-1).square()
    kept = None if target.is_floating_point() else target != o.ignore_index
    losses = losses + (z if kept is None else torch.where(kept, z, 0))
    if o.reduction == "none":
        return losses
    if o.reduction == "sum":
        return losses.sum()
    if kept is None:
        return losses.mean()
    if weight is None:
        return losses.sum() / kept.sum()
    return losses.sum() / torch.where(kept, weight[torch.where(kept, target, 0)], 0).sum()


def divergence(student: Tensor, teacher: Tensor, divergence: str, temperature: float) -> Tensor:
    """F.kl_div and what is written by hand for the others; computed in at least float32."""
    kind = torch.promote_types(student.dtype, torch.float32)
    log_p = F.log_softmax(student / temperature, -1, dtype=kind)
    log_q = F.log_softmax(teacher.detach() / temperature, -1, dtype=kind)
    if divergence == "forward_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if divergence == "jsd":
        m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
        both = [F.kl_div(m, each, reduction="none", log_target=True) for each in (log_p, log_q)]
        return 0.5 * (both[0] + both[1]).sum(-1)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def _supports(input: Tensor, target: Tensor, weight: Tensor | None, *_: Any) -> str | None:
    require_float("input", input)
    return None


def _pair(student: Tensor, teacher: Tensor, *_: Any) -> str | None:
    require_float("student", student)
    return None


BACKENDS: dict[str, Backend] = {
    "cross_entropy": Backend("torch", cross_entropy, supports=_supports),
    "cross_entropy_probs": Backend("torch", cross_entropy, supports=_supports),
    "divergence": Backend("torch", divergence, supports=_pair),
}
