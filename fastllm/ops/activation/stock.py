"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend


def silu(input: Tensor) -> Tensor:
    return F.silu(input)


def gelu(input: Tensor, approximate: str) -> Tensor:
    return F.gelu(input, approximate=approximate)


def relu2(input: Tensor) -> Tensor:
    return F.relu(input).square()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return F.gelu(gate, approximate=approximate) * up


BACKENDS: dict[str, Backend] = {
    f.__name__: Backend("torch", f) for f in (silu, gelu, relu2, swiglu, geglu)
}
