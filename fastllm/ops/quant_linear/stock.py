"""Stock PyTorch: the weight dequantized in the activations' dtype, then torch's own linear."""

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.quant_linear import reference
from fastllm.ops.quant_linear.spec import FLOAT


def quant_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
) -> Tensor:
    if activations != FLOAT:
        return reference.quant_linear(
            input, codes, scales, zeros, bias, act_scale, code, group, activations
        )
    w = reference.weight(codes, scales, zeros, code, group, input.shape[-1], input.dtype)
    return F.linear(input, w, bias)


BACKEND: Backend = Backend("torch", quant_linear)
