"""The contract of moe_permute and moe_unpermute: schemas, checks, fake kernels, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

SCHEMAS = {
    "moe_permute": Schema(
        params="Tensor input, Tensor position",
        returns="Tensor",
        backward_params="Tensor grad_output, Tensor input, Tensor position",
        backward_returns="Tensor",
    ),
    "moe_unpermute": Schema(
        params="Tensor rows, Tensor position, Tensor? weights",
        returns="Tensor",
        backward_params="Tensor grad_output, Tensor rows, Tensor position, Tensor? weights",
        backward_returns="(Tensor, Tensor)",
    ),
}


def check_permute(input: Tensor, position: Tensor) -> None:
    """Raises ValueError or TypeError that names the argument."""
    _require("input", input)
    _check_position(position, input)
    if input.size(0) != position.size(0):
        raise ValueError(
            f"position: expected [{input.size(0)}, choices] for input {list(input.shape)}, "
            f"found {list(position.shape)}"
        )


def check_unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> None:
    """Raises ValueError or TypeError that names the argument."""
    _require("rows", rows)
    _check_position(position, rows)
    if rows.size(0) != position.size(0) * position.size(1):
        raise ValueError(
            f"rows: expected one for each of position {list(position.shape)}, "
            f"found {list(rows.shape)}"
        )
    if weights is not None:
        _require("weights", weights)
        if weights.shape != position.shape or weights.device != rows.device:
            raise ValueError(
                f"weights: expected shape {list(position.shape)} on {rows.device}, "
                f"found {describe(weights)}"
            )


def _require(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    if not value.is_floating_point() or value.dim() != 2:
        raise ValueError(f"{name}: expected a floating point matrix, found {describe(value)}")


def _check_position(position: Any, like: Tensor) -> None:
    if not isinstance(position, Tensor):
        raise TypeError(f"position: expected a Tensor, found {type(position).__name__}")
    if position.dtype != torch.int64 or position.dim() != 2 or position.device != like.device:
        raise ValueError(
            f"position: expected int64 [tokens, choices] on {like.device}, "
            f"found {describe(position)}"
        )


# ---- fake kernels


def fake_permute(input: Tensor, position: Tensor) -> Tensor:
    """[tokens * choices, hidden]"""
    return input.new_empty((position.size(0) * position.size(1), input.size(1)))


def fake_unpermute(rows: Tensor, position: Tensor, *_: Any) -> Tensor:
    """[tokens, hidden]"""
    return rows.new_empty((position.size(0), rows.size(1)))


def fake_permute_backward(input: Tensor, position: Tensor) -> tuple:
    """The gradient of input."""
    return (input.new_empty(input.shape),)


def fake_unpermute_backward(rows: Tensor, position: Tensor, weights: Tensor | None) -> tuple:
    """The gradients of rows and weights."""
    return rows.new_empty(rows.shape), None if weights is None else weights.new_empty(weights.shape)


# ---- costs


def cost(input: Tensor, position: Tensor, *_: Any) -> Cost:
    """Every row of an expert once, every token once."""
    size = (position.numel() + position.size(0)) * input.size(1) * input.element_size()
    flops = 2 * position.numel() * input.size(1)
    return Cost(size, 2 * size, flops, 2 * flops)
