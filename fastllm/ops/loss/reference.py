"""The losses in plain torch: any float dtype, differentiable, in float64 the oracle.

Low precision is computed in float32 and rounded once at the end. Hidden results (the log-sum-exp)
are float64 and detached: only backward reads them.
"""

import math
from typing import Any

import torch
from torch import Tensor


def logits_of(input: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """softcap * tanh(logit_scale * x / softcap), or logit_scale * x; at least float32."""
    x = wide(input) * logit_scale if logit_scale != 1.0 else wide(input)
    return softcap * torch.tanh(x / softcap) if softcap else x


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
    """loss = -(1 - e) w_t log p_t - e / C sum_j w_j log p_j + z lse^2; 0 where ignored."""
    s = logits_of(input, softcap, logit_scale)
    lse = s.logsumexp(-1)
    kept = target != ignore_index
    index = torch.where(kept, target, 0).unsqueeze(-1)
    log_p = s.log_softmax(-1)
    own = torch.where(kept, wide(weight)[index.squeeze(-1)], 0) if weight is not None else kept
    losses = -(1.0 - label_smoothing) * own * log_p.gather(-1, index).squeeze(-1)
    if label_smoothing:
        weighted = log_p if weight is None else log_p * wide(weight)
        losses = losses - label_smoothing / input.shape[1] * weighted.sum(-1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    losses = torch.where(kept, losses, 0)
    if reduction == "mean":
        losses = losses.sum() / own.sum().to(losses.dtype)
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(input.dtype), lse.detach().double()


def cross_entropy_probs(
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
    """loss = -sum_j w_j ((1 - e) q_j + e / C) log p_j + z lse^2"""
    s = logits_of(input, softcap, logit_scale)
    lse = s.logsumexp(-1)
    soft = (1.0 - label_smoothing) * wide(target) + label_smoothing / input.shape[1]
    if weight is not None:
        soft = soft * wide(weight)
    losses = -(soft * s.log_softmax(-1)).sum(-1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    if reduction == "mean":
        losses = losses.sum() / max(input.shape[0], 0) if input.shape[0] else losses.sum() / 0.0
    elif reduction == "sum":
        losses = losses.sum()
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
    """dx_j = slope_j ((sum of soft targets + 2 z lse) p_j - soft target_j) g"""
    s = logits_of(input, softcap, logit_scale)
    classes = input.shape[1]
    kept = (target != ignore_index).unsqueeze(-1)
    index = torch.where(kept, target.unsqueeze(-1), 0)
    w = None if weight is None else wide(weight).to(s.dtype)
    own = kept.to(s.dtype) if w is None else torch.where(kept, w[index], 0)
    soft = torch.zeros_like(s).scatter(-1, index, (1.0 - label_smoothing) * own)
    if label_smoothing:
        spread = label_smoothing / classes
        soft = soft + (spread if w is None else spread * w)
    g = torch.where(kept, _upstream(grad_loss, reduction, s, own.sum()), 0)
    return (_to_input(input, s, soft, g, z_loss, softcap, logit_scale, kept),)


def cross_entropy_probs_backward(
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
    """As cross_entropy_backward; dq_j = -(1 - e) w_j log p_j g"""
    s = logits_of(input, softcap, logit_scale)
    soft = (1.0 - label_smoothing) * wide(target).to(s.dtype) + label_smoothing / input.shape[1]
    w = 1.0 if weight is None else wide(weight).to(s.dtype)
    g = _upstream(grad_loss, reduction, s, input.shape[0])
    dx = dq = None
    if needs[0]:
        dx = _to_input(input, s, soft * w, g, z_loss, softcap, logit_scale, None)
    if needs[1]:
        dq = (-(1.0 - label_smoothing) * w * s.log_softmax(-1) * g).to(target.dtype)
    return dx, dq


def _to_input(
    input: Tensor,
    s: Tensor,
    soft: Tensor,
    g: Tensor,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    kept: Tensor | None,
) -> Tensor:
    mass = soft.sum(-1, keepdim=True)
    if z_loss:
        mass = mass + 2.0 * z_loss * s.logsumexp(-1, keepdim=True)
    d = (mass * s.softmax(-1) - soft) * g * _slope(input, softcap, logit_scale)
    return (d if kept is None else torch.where(kept, d, 0)).to(input.dtype)


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
