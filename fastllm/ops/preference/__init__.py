"""Preference losses on log-probabilities: DPO, ORPO, SimPO, CPO, KTO, GRPO.

What costs memory in them is the log-probability of each token; `token_log_probs` and
`sequence_log_probs` bring it from hidden states and the head's weight without holding all logits.
The losses are a few operations on [B] or [B, T] values, in float32 at least.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops.linear_loss import token_log_probs
from fastllm.ops.loss import spec

NORMALIZATIONS = ("sequence", "token")


def sequence_log_probs(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    average: bool = False,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """log p of each sequence: the sum, or the average, of its tokens' log-probabilities.

    input [B, T, H], weight [C, H], target [B, T] (already shifted; ignore_index counts nothing),
    bias [C] or None; further options as for `linear_cross_entropy`. Each token's value is of
    input's dtype, the sum is float32 at least. Returns [B]; 0 where all tokens are ignored.
    """
    tokens = token_log_probs(input, weight, target, bias, ignore_index=ignore_index, **options)
    total = _wide(tokens).sum(-1)
    return total / (target != ignore_index).sum(-1).clamp(min=1) if average else total


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))).

    All [B], sums over a sequence's tokens; the reference's get no gradient. label_smoothing is the
    chance that a pair is labelled the wrong way round. (Rafailov et al. 2023; conservative DPO:
    Mitchell 2023.) Raises ValueError for shapes or options that do not fit.
    """
    pairs = {"rejected": rejected, "ref_chosen": ref_chosen, "ref_rejected": ref_rejected}
    _same_shapes("chosen", chosen, pairs)
    reference = _wide(ref_chosen).detach() - _wide(ref_rejected).detach()
    margin = beta * (_wide(chosen) - _wide(rejected) - reference)
    return _reduced(_smoothed(margin, label_smoothing), reduction)


def cpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected)) - alpha chosen.

    Both [B], sums over a sequence's tokens. No reference model; alpha weighs the likelihood of
    what was chosen. (Xu et al. 2024.) Raises ValueError for shapes or options that do not fit.
    """
    _same_shapes("chosen", chosen, {"rejected": rejected})
    c, r = _wide(chosen), _wide(rejected)
    return _reduced(_smoothed(beta * (c - r), label_smoothing) - alpha * c, reduction)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma).

    Both [B], averages over a sequence's tokens (`sequence_log_probs(..., average=True)`); gamma is
    the margin that is asked for. (Meng et al. 2024.) Raises ValueError for shapes or options that
    do not fit.
    """
    _same_shapes("chosen", chosen, {"rejected": rejected})
    margin = beta * (_wide(chosen) - _wide(rejected)) - gamma
    return _reduced(_smoothed(margin, label_smoothing), reduction)


def orpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, reduction: str = "mean"
) -> Tensor:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p).

    Both [B], averages over a sequence's tokens, below 0. (Hong et al. 2024, with lambda = beta.)
    Raises ValueError for shapes or options that do not fit.
    """
    _same_shapes("chosen", chosen, {"rejected": rejected})
    c, r = _wide(chosen), _wide(rejected)
    ratio = (c - r) - (_log_complement(c) - _log_complement(r))
    return _reduced(-c - beta * F.logsigmoid(ratio), reduction)


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    desirable: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """weight (1 - sigmoid(+-beta (log_probs - ref_log_probs - kl))), + where desirable.

    log_probs, ref_log_probs, desirable (bool)  [B], sums over a sequence's tokens
    kl  the policy's distance from the reference (of mismatched pairs), a scalar; taken as 0 where
        negative. It and the reference get no gradient. (Ethayarajh et al. 2024.)

    Raises ValueError or TypeError for arguments that do not fit.
    """
    _same_shapes("log_probs", log_probs, {"ref_log_probs": ref_log_probs, "desirable": desirable})
    if desirable.dtype != torch.bool:
        raise TypeError(f"desirable: expected a bool tensor, found {desirable.dtype}")
    floor = kl.detach().clamp(min=0) if isinstance(kl, Tensor) else max(kl, 0.0)
    gain = beta * (_wide(log_probs) - _wide(ref_log_probs).detach() - floor)
    good, bad = desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    return _reduced(torch.where(desirable, good, bad), reduction)


def grpo_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    *,
    beta: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalization: str = "sequence",
) -> Tensor:
    """The clipped policy gradient of GRPO, and beta times the distance from a reference.

    log_probs      [B, T], a token's log-probability under the policy
    advantages     [B] or [B, T], relative to the group; no gradient
    mask           [B, T] bool, True where a token counts
    old_log_probs  of the policy that sampled; None: the policy itself, as it is now
    ref_log_probs  of the reference; needed where beta is not 0
    clip_low, clip_high  the ratio counts between 1 - clip_low and 1 + clip_high
    normalization  "sequence": mean over each sequence's tokens, then over sequences (Shao et al.
                   2024); "token": mean over all tokens (DAPO, Yu et al. 2025)

    Returns a scalar; tokens that do not count add exactly 0, whatever they hold. Raises ValueError
    or TypeError for arguments that do not fit.
    """
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs: expected [B, T], found {list(log_probs.shape)}")
    given = {"mask": mask, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs}
    _same_shapes("log_probs", log_probs, {n: t for n, t in given.items() if t is not None})
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool tensor, found {mask.dtype}")
    if advantages.shape not in (log_probs.shape, log_probs.shape[:1]):
        raise ValueError(
            f"advantages: expected {list(log_probs.shape[:1])} or {list(log_probs.shape)}, "
            f"found {list(advantages.shape)}"
        )
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"normalization: expected one of {NORMALIZATIONS}, found {normalization!r}"
        )
    if beta and ref_log_probs is None:
        raise ValueError(f"ref_log_probs: expected a tensor, since beta is {beta}, found None")
    log_p = torch.where(mask, _wide(log_probs), 0)  # before exp: no NaN comes back through where
    old = log_p if old_log_probs is None else torch.where(mask, _wide(old_log_probs), 0)
    gain = _wide(advantages).detach()
    gain = gain.unsqueeze(-1) if gain.dim() == 1 else gain
    ratio = (log_p - old.detach()).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    losses = -torch.minimum(ratio * gain, clipped * gain)
    if beta and ref_log_probs is not None:
        gap = torch.where(mask, _wide(ref_log_probs), 0).detach() - log_p
        losses = losses + beta * (torch.expm1(gap) - gap)
    losses = torch.where(mask, losses, 0)
    if normalization == "token":
        return losses.sum() / mask.sum().clamp(min=1)
    return (losses.sum(-1) / mask.sum(-1).clamp(min=1)).mean()


# ---- what they share


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _log_complement(log_p: Tensor) -> Tensor:
    """log(1 - e^log_p) for log_p < 0, by the formula that is exact on its side of -ln 2."""
    near = log_p > -0.6931
    # each formula sees only its own side, so that no inf becomes NaN in a gradient
    close = torch.log(-torch.expm1(torch.where(near, log_p, -0.5)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -1.0, log_p))))


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    if not 0.0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing: expected 0 to 0.5, found {label_smoothing}")
    losses = -F.logsigmoid(margin)
    if not label_smoothing:
        return losses
    return (1.0 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margin)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in spec.REDUCTIONS:
        raise ValueError(f"reduction: expected one of {spec.REDUCTIONS}, found {reduction!r}")
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _same_shapes(name: str, tensor: Tensor, others: dict[str, Tensor]) -> None:
    spec.require_float(name, tensor)
    for other, value in others.items():
        if value.shape != tensor.shape:
            raise ValueError(
                f"{other}: expected the shape of {name}, {list(tensor.shape)}, "
                f"found {list(value.shape)}"
            )
