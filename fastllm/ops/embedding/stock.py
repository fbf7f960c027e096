"""Stock PyTorch."""

import torch
from torch import Tensor

from fastllm.core.backend import Backend


def embedding(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    return torch.embedding(weight, input, padding_idx, scale_grad_by_freq)


BACKEND: Backend = Backend("torch", embedding)
