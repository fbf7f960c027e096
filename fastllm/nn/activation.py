"""GELU and SiLU: torch's modules with forward through fastllm.functional.

`activation` is the name that fastllm's fused functions know the module's function by.
"""

import torch
from torch import Tensor

from fastllm import functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu2")


class GELU(torch.nn.GELU):
    """torch.nn.GELU (Hendrycks & Gimpel 2016), exact or approximate="tanh"; input [*]."""

    backend: str | None = None

    @property
    def activation(self) -> str:
        """ "gelu" or "gelu_tanh"."""
        return "gelu" if self.approximate == "none" else "gelu_tanh"

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or input.is_nested:
            return super().forward(input)
        return F.gelu(input, self.approximate, backend=self.backend)


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU (Elfwing et al. 2017); input [*]; in place where `inplace` asks for it."""

    backend: str | None = None
    activation = "silu"

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or input.is_nested or self.inplace:
            return super().forward(input)
        return F.silu(input, backend=self.backend)


def apply(name: str, input: Tensor, backend: str | None = None) -> Tensor:
    """The activation called `name`, one of ACTIVATIONS, elementwise."""
    if name == "silu":
        return F.silu(input, backend=backend)
    if name == "relu":
        return torch.relu(input)
    if name == "relu2":
        return F.relu2(input, backend=backend)
    return F.gelu(input, "none" if name == "gelu" else "tanh", backend=backend)


def check_activation(name: str) -> str:
    """`name` itself; ValueError when it is not one of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {name!r}")
    return name
