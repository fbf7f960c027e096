"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.reference import activate


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    y = activate(F.linear(input, weight, bias), activation)
    return y if residual is None else y + residual


def linear_pre(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    z = F.linear(input, weight, bias)
    y = activate(z, activation)
    if residual is not None:
        y = y + residual
    return (y.clone() if y is z else y), z


def gated_linear(input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str) -> Tensor:
    return gated_linear_pre(input, weight_gate, weight_up, activation)[0]


def gated_linear_pre(
    input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = F.linear(input, weight_gate), F.linear(input, weight_up)
    return activate(gate, activation) * up, gate, up


def matmul(input: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(input, other)


def _any(*_: Any) -> None:
    return None


BACKENDS: dict[str, Backend] = {
    "linear": Backend("torch", linear, supports=_any),
    "linear_pre": Backend("torch", linear_pre, supports=_any),
    "gated_linear": Backend("torch", gated_linear, supports=_any),
    "gated_linear_pre": Backend("torch", gated_linear_pre, supports=_any),
    "matmul": Backend("torch", matmul, supports=_any),
}
