"""What embedding takes: schema, checks, shapes of results, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

SCHEMA = Schema(
    "Tensor weight, Tensor input, SymInt padding_idx, bool scale_grad_by_freq",
    "Tensor",
    "Tensor grad_output, Tensor input, SymInt num_embeddings, SymInt embedding_dim, "
    "ScalarType dtype, SymInt padding_idx, bool scale_grad_by_freq",
    "Tensor",
)
INDICES = (torch.int32, torch.int64)


def check(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> None:
    """TypeError or ValueError that names the argument; indices are looked at when they are read."""
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        found = describe(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: expected a floating point Tensor, found {found}")
    if not (isinstance(input, Tensor) and input.dtype in INDICES):
        found = describe(input) if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"input: expected an int32 or int64 Tensor, found {found}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [V, N], found {describe(weight)}")
    if input.device != weight.device:
        raise ValueError(f"input: expected a Tensor on {weight.device}, found {describe(input)}")


def fake(weight: Tensor, input: Tensor, *_: Any) -> Tensor:
    """A row for each index."""
    return weight.new_empty((*input.shape, weight.shape[1]))


def fake_backward(input: Tensor, rows: int, cols: int, dtype: torch.dtype, *_: Any) -> tuple:
    """The gradient of weight."""
    return (input.new_empty((rows, cols), dtype=dtype),)


def cost(weight: Tensor, input: Tensor, *_: Any) -> Cost:
    """Forward reads and writes the rows; backward reads them and writes the whole gradient."""
    rows = input.numel() * weight.shape[1] * weight.element_size()
    return Cost(2 * rows, rows + weight.nbytes, 0, input.numel() * weight.shape[1])
