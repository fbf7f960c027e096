"""CrossEntropyLoss as torch has it, DistillationLoss, and both of them out of hidden states."""

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
        skip_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignore_index, self.reduction = ignore_index, reduction
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.softcap, self.logit_scale = softcap, logit_scale
        self.chunk_bytes, self.skip_below = chunk_bytes, skip_below

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        lora_scale: float = 1.0,
        lora_input: Tensor | None = None,
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
            lora_a=lora_a,
            lora_b=lora_b,
            lora_scale=lora_scale,
            lora_input=lora_input,
            chunk_bytes=self.chunk_bytes,
            skip_below=self.skip_below,
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


class LinearDistillationLoss(torch.nn.Module):
    """distillation_loss of two heads without ever holding all logits of either.

    Hidden states, weights (heads' or tied embeddings') and biases are given to forward: the module
    holds options only. See fastllm.functional.linear_distillation_loss.
    """

    backend: str | None = None

    def __init__(
        self,
        temperature: float = 1.0,
        alpha: float = 0.5,
        divergence: str = "forward_kl",
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        chunk_bytes: int = 32 << 20,
    ) -> None:
        super().__init__()
        self.temperature, self.alpha, self.divergence = temperature, alpha, divergence
        self.ignore_index, self.reduction = ignore_index, reduction
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        target: Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        return F.linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            target,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            alpha=self.alpha,
            divergence=self.divergence,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            chunk_bytes=self.chunk_bytes,
            backend=self.backend,
        )
