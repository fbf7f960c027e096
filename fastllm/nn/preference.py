"""Preference losses from hidden states and a head's weight: the logits never exist as a whole.

Pairs come as in most trainers: the first half of the batch was chosen, the second half rejected.
`input` is [2B, T, H] (KTO and GRPO: [B, T, H]), `target` its tokens, already shifted, with
ignore_index where nothing counts (a prompt, padding); `weight` [C, H] and `bias` are the head's.
"""

import torch
from torch import Tensor

from fastllm import functional as F


class _Preference(torch.nn.Module):
    """Options that all have in common."""

    backend: str | None = None

    def __init__(self, ignore_index: int, chunk_bytes: int) -> None:
        super().__init__()
        self.ignore_index, self.chunk_bytes = ignore_index, chunk_bytes

    def log_probs(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        average: bool = False,
    ) -> Tensor:
        """[B] of sequences [B, T, H]."""
        if input.dim() != 3:
            raise ValueError(f"input: expected [B, T, H], found {list(input.shape)}")
        return F.sequence_log_probs(
            input,
            weight,
            target,
            bias,
            average=average,
            ignore_index=self.ignore_index,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )

    def pairs(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        average: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(chosen, rejected), [B] each."""
        if input.shape[0] % 2:
            raise ValueError(
                f"input: expected an even batch, chosen then rejected, found {input.shape[0]}"
            )
        chosen, rejected = self.log_probs(input, weight, target, bias, average).chunk(2)
        return chosen, rejected


class DPOLoss(_Preference):
    """See fastllm.functional.dpo_loss; the reference's head is ref_weight, by default weight."""

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta, self.label_smoothing = beta, label_smoothing

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        ref_input: Tensor,
        ref_weight: Tensor | None = None,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Tensor:
        with torch.no_grad():
            head = weight if ref_weight is None else ref_weight
            offset = bias if ref_weight is None else ref_bias
            reference = self.pairs(ref_input, head, target, offset)
        pairs = self.pairs(input, weight, target, bias)
        return F.dpo_loss(*pairs, *reference, beta=self.beta, label_smoothing=self.label_smoothing)


class CPOLoss(_Preference):
    """See fastllm.functional.cpo_loss."""

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        *,
        ignore_index: int = -100,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta, self.alpha, self.label_smoothing = beta, alpha, label_smoothing

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return F.cpo_loss(
            *self.pairs(input, weight, target, bias),
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
        )


class SimPOLoss(_Preference):
    """See fastllm.functional.simpo_loss."""

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 0.5,
        *,
        ignore_index: int = -100,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta, self.gamma = beta, gamma

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        pairs = self.pairs(input, weight, target, bias, average=True)
        return F.simpo_loss(*pairs, beta=self.beta, gamma=self.gamma)


class ORPOLoss(_Preference):
    """See fastllm.functional.orpo_loss."""

    def __init__(
        self, beta: float = 0.1, *, ignore_index: int = -100, chunk_bytes: int = 32 << 20
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta = beta

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return F.orpo_loss(*self.pairs(input, weight, target, bias, average=True), beta=self.beta)


class KTOLoss(_Preference):
    """See fastllm.functional.kto_loss; reference log-probabilities [B] and kl are given."""

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        *,
        ignore_index: int = -100,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta = beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        desirable: Tensor,
        ref_log_probs: Tensor,
        kl: Tensor | float = 0.0,
        bias: Tensor | None = None,
    ) -> Tensor:
        return F.kto_loss(
            self.log_probs(input, weight, target, bias),
            ref_log_probs,
            desirable,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


class GRPOLoss(_Preference):
    """See fastllm.functional.grpo_loss; a token counts where its target is not ignored."""

    def __init__(
        self,
        beta: float = 0.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        normalization: str = "sequence",
        *,
        ignore_index: int = -100,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__(ignore_index, chunk_bytes)
        self.beta, self.clip_low, self.clip_high = beta, clip_low, clip_high
        self.normalization = normalization

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        advantages: Tensor,
        old_log_probs: Tensor | None = None,
        ref_log_probs: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        log_probs = F.token_log_probs(
            input,
            weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )
        return F.grpo_loss(
            log_probs,
            advantages,
            target != self.ignore_index,
            old_log_probs,
            ref_log_probs,
            beta=self.beta,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            normalization=self.normalization,
        )
