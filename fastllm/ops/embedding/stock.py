"""Stock PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend


def embedding(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding(input, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


BACKEND: Backend = Backend("torch", embedding)
