"""Preference losses from hidden states and a head's weight: the logits never exist as a whole.

Pairs come as in most trainers: the first half of the batch was chosen, the second half rejected.
`input` is [2B, T, H] (KTO and GRPO: [B, T, H]), `target` its tokens, already shifted, with
ignore_index where nothing counts (a prompt, padding); `weight` [C, H] and `bias` are the head's.
"""

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import Tensor

from fastllm import functional as F

_SHARED = (
    Parameter("ignore_index", Parameter.KEYWORD_ONLY, default=-100, annotation=int),
    Parameter("chunk_bytes", Parameter.KEYWORD_ONLY, default=32 << 20, annotation=int),
)


class _Preference(torch.nn.Module):
    """A loss of fastllm.functional on log-probabilities that are made from hidden states.

    The constructor takes the loss's own options, with its defaults, then ignore_index and
    chunk_bytes by keyword; all are attributes.
    """

    backend: str | None = None
    __signature__: Signature
    loss: Callable[..., Tensor]
    average: bool
    names: tuple[str, ...]
    ignore_index: int
    chunk_bytes: int

    def __init_subclass__(cls, loss: Callable[..., Tensor] | None = None, average: bool = False):
        """`loss` takes log-probabilities: with `average` a sequence's mean, else its sum."""
        super().__init_subclass__()
        if loss is None:
            return
        options = [p for p in signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
        own = [p.replace(kind=Parameter.POSITIONAL_OR_KEYWORD) for p in options]
        cls.__signature__ = Signature([*own, *_SHARED])
        cls.loss, cls.average = staticmethod(loss), average
        cls.names = tuple(p.name for p in own)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        given = self.__signature__.bind(*args, **kwargs)
        given.apply_defaults()
        for name, value in given.arguments.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    @property
    def options(self) -> dict[str, Any]:
        """What the loss is called with."""
        return {name: getattr(self, name) for name in self.names}

    def log_probs(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
    ) -> Tensor:
        """[B] of sequences [B, T, H]."""
        if input.dim() != 3:
            raise ValueError(f"input: expected [B, T, H], found {list(input.shape)}")
        return F.sequence_log_probs(
            input,
            weight,
            target,
            bias,
            average=self.average,
            ignore_index=self.ignore_index,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )

    def pairs(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(chosen, rejected), [B] each."""
        if input.shape[0] % 2:
            raise ValueError(
                f"input: expected an even batch, chosen then rejected, found {input.shape[0]}"
            )
        chosen, rejected = self.log_probs(input, weight, target, bias).chunk(2)
        return chosen, rejected


class _Pairs(_Preference):
    """A loss that compares what was chosen with what was rejected, and nothing else."""

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return self.loss(*self.pairs(input, weight, target, bias), **self.options)


class CPOLoss(_Pairs, loss=F.cpo_loss):
    """See fastllm.functional.cpo_loss."""


class SimPOLoss(_Pairs, loss=F.simpo_loss, average=True):
    """See fastllm.functional.simpo_loss."""


class ORPOLoss(_Pairs, loss=F.orpo_loss, average=True):
    """See fastllm.functional.orpo_loss."""


class DPOLoss(_Preference, loss=F.dpo_loss):
    """See fastllm.functional.dpo_loss; the reference's head is ref_weight, by default weight."""

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
        return self.loss(*pairs, *reference, **self.options)


class KTOLoss(_Preference, loss=F.kto_loss):
    """See fastllm.functional.kto_loss; reference log-probabilities [B] and kl are given."""

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
        log_probs = self.log_probs(input, weight, target, bias)
        return self.loss(log_probs, ref_log_probs, desirable, kl, **self.options)


class GRPOLoss(_Preference, loss=F.grpo_loss):
    """See fastllm.functional.grpo_loss; a token counts where its target is not ignored."""

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
        kept = target != self.ignore_index
        return self.loss(log_probs, advantages, kept, old_log_probs, ref_log_probs, **self.options)
