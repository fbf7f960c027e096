"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

import torch

from fastllm.core.backend import Backend
from fastllm.ops.softmax.spec import check

BACKENDS: dict[str, Backend] = {
    "softmax": Backend("torch", torch.softmax, supports=check),
    "log_softmax": Backend("torch", torch.log_softmax, supports=check),
}
