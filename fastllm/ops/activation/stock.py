"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend


def gelu(input: Tensor, approximate: str) -> Tensor:
    return F.gelu(input, approximate=approximate)


def relu2(input: Tensor) -> Tensor:
    return torch.relu(input).square()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


BACKENDS: dict[str, Backend] = {
    f.__name__: Backend("torch", f) for f in (gelu, relu2, swiglu, geglu)
}
BACKENDS["silu"] = Backend("torch", torch._C._nn.silu)  # F.silu behind its Python code
