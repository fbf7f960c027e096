"""Stock PyTorch: the weight in full, then torch's own linear."""

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.sparse_linear import reference
from fastllm.ops.sparse_linear.spec import DYNAMIC


def sparse_linear(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> Tensor:
    if activations == DYNAMIC:
        return reference.sparse_linear(input, values, kept, scales, bias, activations)
    return F.linear(
        input, reference.weight(values, kept, scales, input.shape[-1], input.dtype), bias
    )


BACKEND: Backend = Backend("torch", sparse_linear)
