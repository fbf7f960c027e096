"""CrossEntropyLoss, LinearCrossEntropyLoss, DistillationLoss: torch's modules, and their kin."""

import torch
from torch import Tensor

from fastllm import functional as F


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss; `backend` is a class attribute (None: the best one)."""

    backend: str | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """cross_entropy(linear(input, weight, bias), target) without ever holding all logits.

    input [..., H], target [...], weight [C, H] (a head's, or a tied embedding's) and bias are given
    to forward: the module holds options only. See fastllm.functional.linear_cross_entropy.
    """

    backend: str | None = None

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.softcap, self.logit_scale, self.chunk_bytes = softcap, logit_scale, chunk_bytes

    def forward(
        self, input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return F.linear_cross_entropy(
            input,
            weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )


class DistillationLoss(torch.nn.Module):
    """alpha T^2 divergence + (1 - alpha) cross entropy: fastllm.functional.distillation_loss."""

    backend: str | None = None

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.5,
        divergence: str = "forward_kl",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.temperature, self.alpha, self.divergence = temperature, alpha, divergence
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None
    ) -> Tensor:
        return F.distillation_loss(
            student_logits,
            teacher_logits,
            target,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            backend=self.backend,
        )
