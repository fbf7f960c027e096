"""The losses in plain torch: any float dtype, differentiable, in float64 the oracle.

Low precision is computed in float32 and rounded once at the end. Hidden results (the log-sum-exp)
are float64 and detached: only backward reads them.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fastllm.ops.loss.spec import Options


def logits_of(input: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """softcap * tanh(logit_scale * x / softcap), or logit_scale * x; at least float32."""
    x = wide(input) * logit_scale if logit_scale != 1.0 else wide(input)
    return softcap * torch.tanh(x / softcap) if softcap else x


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """loss = -(1 - e) w_t log p_t - e / C sum_j w_j log p_j + z lse^2; 0 where ignored."""
    o = Options(*options)
    s = logits_of(input, o.softcap, o.logit_scale)
    kept = target != o.ignore_index
    index = torch.where(kept, target, 0).unsqueeze(-1)
    log_p = s.log_softmax(-1)
    own = torch.where(kept, wide(weight)[index.squeeze(-1)], 0) if weight is not None else kept
    losses = -(1.0 - o.label_smoothing) * own * log_p.gather(-1, index).squeeze(-1)
    if o.label_smoothing:
        weighted = log_p if weight is None else log_p * wide(weight)
        losses = losses - o.label_smoothing / input.shape[1] * weighted.sum(-1)
    return _finished(input, s, losses, o, kept, own.sum())


def cross_entropy_probs(
    input: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """loss = -sum_j w_j ((1 - e) q_j + e / C) log p_j + z lse^2"""
    o = Options(*options)
    s = logits_of(input, o.softcap, o.logit_scale)
    losses = -(_soft(s, target, weight, o) * s.log_softmax(-1)).sum(-1)
    return _finished(input, s, losses, o, None, torch.tensor(input.shape[0]))


def _soft(s: Tensor, target: Tensor, weight: Tensor | None, o: Options) -> Tensor:
    """w_j ((1 - e) q_j + e / C) of probability targets q."""
    soft = (1.0 - o.label_smoothing) * wide(target).to(s.dtype) + o.label_smoothing / s.shape[1]
    return soft if weight is None else soft * wide(weight).to(s.dtype)


def _finished(
    input: Tensor, s: Tensor, losses: Tensor, o: Options, kept: Tensor | None, divisor: Tensor
) -> tuple[Tensor, Tensor]:
    """(the loss: with z-loss, masked and reduced; the log-sum-exp for backward)"""
    lse = s.logsumexp(-1)
    if o.z_loss:
        losses = losses + o.z_loss * lse.square()
    if kept is not None:
        losses = torch.where(kept, losses, 0)
    if o.reduction != "none":
        losses = losses.double().sum()
    if o.reduction == "mean":
        losses = losses / divisor.double()
    return losses.to(input.dtype), lse.detach().double()


def _slope(input: Tensor, softcap: float, logit_scale: float) -> Tensor | float:
    """The derivative of logits_of."""
    if not softcap:
        return logit_scale
    return logit_scale * (1.0 - torch.tanh(wide(input) * (logit_scale / softcap)).square())


def _upstream(grad_loss: Tensor, reduction: str, like: Tensor, divisor: Any) -> Tensor:
    """The gradient of each row's loss, as a column."""
    g = wide(grad_loss).to(like.dtype)
    if reduction == "mean":
        g = g / divisor
    return g.unsqueeze(-1) if reduction == "none" else g.expand(like.shape[0], 1)


def cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dx_j = slope_j ((sum of soft targets + 2 z lse) p_j - soft target_j) g"""
    o = Options(*rest[:-1])
    s = logits_of(input, o.softcap, o.logit_scale)
    kept = (target != o.ignore_index).unsqueeze(-1)
    index = torch.where(kept, target.unsqueeze(-1), 0)
    w = None if weight is None else wide(weight).to(s.dtype)
    own = kept.to(s.dtype) if w is None else torch.where(kept, w[index], 0)
    soft = torch.zeros_like(s).scatter(-1, index, (1.0 - o.label_smoothing) * own)
    if o.label_smoothing:
        spread = o.label_smoothing / input.shape[1]
        soft = soft + (spread if w is None else spread * w)
    g = torch.where(kept, _upstream(grad_loss, o.reduction, s, own.sum()), 0)
    return (torch.where(kept, _to_input(input, s, soft, g, o), 0).to(input.dtype),)


def cross_entropy_probs_backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """As cross_entropy_backward; dq_j = -(1 - e) w_j log p_j g"""
    o, needs = Options(*rest[:-1]), rest[-1]
    s = logits_of(input, o.softcap, o.logit_scale)
    g = _upstream(grad_loss, o.reduction, s, input.shape[0])
    dx = dq = None
    if needs[0]:
        dx = _to_input(input, s, _soft(s, target, weight, o), g, o).to(input.dtype)
    if needs[1]:
        w = 1.0 if weight is None else wide(weight).to(s.dtype)
        dq = (-(1.0 - o.label_smoothing) * w * s.log_softmax(-1) * g).to(target.dtype)
    return dx, dq


def _to_input(input: Tensor, s: Tensor, soft: Tensor, g: Tensor, o: Options) -> Tensor:
    mass = soft.sum(-1, keepdim=True)
    if o.z_loss:
        mass = mass + 2.0 * o.z_loss * s.logsumexp(-1, keepdim=True)
    return (mass * s.softmax(-1) - soft) * g * _slope(input, o.softcap, o.logit_scale)


# ---- divergences


def _terms(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, ...]:
    log_p = (wide(student) / temperature).log_softmax(-1)
    log_q = (wide(teacher).detach().to(log_p.dtype) / temperature).log_softmax(-1)
    return log_p.exp(), log_p, log_q.exp(), log_q


def _times(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, 0 where p is 0."""
    return torch.where(p > 0, p * torch.where(p > 0, log_ratio, 0), 0)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2.0)


def divergence(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Of each row: KL(q|p), KL(p|q), their Jensen-Shannon divergence, or half of sum |p - q|."""
    p, log_p, q, log_q = _terms(student, teacher, temperature)
    if divergence == "forward_kl":
        loss = _times(q, log_q - log_p).sum(-1)
    elif divergence == "reverse_kl":
        loss = _times(p, log_p - log_q).sum(-1)
    elif divergence == "jsd":
        m = _mixture(log_p, log_q)
        loss = 0.5 * (_times(q, log_q - m) + _times(p, log_p - m)).sum(-1)
    else:
        loss = 0.5 * (p - q).abs().sum(-1)
    return loss, student.new_zeros((student.shape[0], 3), dtype=torch.float64)


def divergence_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    stats: Tensor,
    divergence: str,
    temperature: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """ds = p (f - sum p f) / T, where f is what the divergence weighs p's change by."""
    p, log_p, q, log_q = _terms(student, teacher, temperature)
    if divergence == "forward_kl":
        d = p - q
    else:
        if divergence == "reverse_kl":
            f = torch.where(p > 0, log_p - log_q, 0)
        elif divergence == "jsd":
            f = 0.5 * torch.where(p > 0, log_p - _mixture(log_p, log_q), 0)
        else:
            f = 0.5 * (p - q).sign()
        d = p * (f - (p * f).sum(-1, keepdim=True))
    return ((d * grad_loss.to(d.dtype).unsqueeze(-1) / temperature).to(student.dtype),)
