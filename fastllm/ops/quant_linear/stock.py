"""Stock PyTorch: the weight dequantized in the activations' dtype, then torch's own linear."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.reference import activate
from fastllm.ops.quant_linear import reference
from fastllm.ops.quant_linear.spec import FLOAT, Terms


def quant_linear(input: Tensor, *rest: Any) -> Tensor:
    terms = Terms(*rest)
    if terms.activations != FLOAT:
        return reference.quant_linear(input, *rest)
    w = reference.weight(*terms.weight, input.shape[-1], input.dtype)
    return activate(F.linear(input, w, terms.bias), terms.activation)


BACKEND: Backend = Backend("torch", quant_linear)
