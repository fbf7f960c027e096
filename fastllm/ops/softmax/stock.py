"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.softmax.spec import check


def softmax(input: Tensor, dim: int) -> Tensor:
    return F.softmax(input, dim)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    return F.log_softmax(input, dim)


BACKENDS: dict[str, Backend] = {
    "softmax": Backend("torch", softmax, supports=check),
    "log_softmax": Backend("torch", log_softmax, supports=check),
}
