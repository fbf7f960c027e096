"""The contract of grouped_linear: schema, argument checks, fake kernels, cost."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

_PARAMS = "Tensor input, Tensor weights, Tensor offsets, Tensor? bias"
SCHEMA = Schema(
    params=_PARAMS,
    returns="Tensor",
    backward_params=f"Tensor grad_output, {_PARAMS}",
    backward_returns="(Tensor, Tensor, Tensor)",
)


# ---- arguments


def check(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError or TypeError that names the argument."""
    _require("input", input, 2, "[tokens, K]")
    _require("weights", weights, 3, "[E, N, K]")
    experts, outputs, inner = weights.shape
    if input.size(1) != inner:
        raise ValueError(
            f"weights: expected [E, N, {input.size(1)}] for input {list(input.shape)}, "
            f"found {list(weights.shape)}"
        )
    _match("weights", weights, input)
    if not isinstance(offsets, Tensor):
        raise TypeError(f"offsets: expected a Tensor, found {type(offsets).__name__}")
    if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.size(0) != experts:
        raise ValueError(f"offsets: expected int32[{experts}], found {describe(offsets)}")
    if offsets.device != input.device:
        raise ValueError(f"offsets: expected them on {input.device}, found {offsets.device}")
    if bias is not None:
        _require("bias", bias, 2, "[E, N]")
        if bias.size(0) != experts or bias.size(1) != outputs:
            raise ValueError(
                f"bias: expected shape [{experts}, {outputs}], found {list(bias.shape)}"
            )
        _match("bias", bias, input)


def _require(name: str, value: Any, dims: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, found {describe(value)}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {shape}, found {list(value.shape)}")


def _match(name: str, value: Tensor, input: Tensor) -> None:
    if value.dtype != input.dtype or value.device != input.device:
        raise ValueError(
            f"{name}: expected input's dtype and device ({describe(input)}), "
            f"found {describe(value)}"
        )


def segments(offsets: Tensor, tokens: int) -> list[tuple[int, int]]:
    """[(first row, end)] of each expert, on the host; ValueError unless they fit `tokens` rows."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    pairs = list(zip(starts, ends, strict=True))
    if any(start > end for start, end in pairs) or (ends and ends[-1] > tokens):
        raise ValueError(
            f"offsets: expected ends that do not decrease, from 0 to {tokens}, found {ends}"
        )
    return pairs


# ---- fake kernels and cost


def fake(input: Tensor, weights: Tensor, *_: Any) -> Tensor:
    """[tokens, N], contiguous."""
    return input.new_empty((input.size(0), weights.size(1)))


def fake_backward(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> tuple:
    """Gradients of input, weights and bias, contiguous."""
    made = [None if t is None else t.new_empty(t.shape) for t in (input, weights, bias)]
    return tuple(made)


def cost(input: Tensor, weights: Tensor, *_: Any) -> Cost:
    """Every row meets one expert; every expert's weights are read (and their gradient written)."""
    tokens, inner = input.shape
    outputs = weights.size(1)
    size = input.element_size()
    rows, flops = tokens * (inner + outputs) * size, 2 * tokens * inner * outputs
    held = weights.numel() * size
    return Cost(rows + held, 2 * rows + 2 * held, flops, 2 * flops)
