"""dropout_add in plain torch: any dtype, differentiable, in float64 the oracle."""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.attention.random import factor, keep

ROW = 1 << 15  # elements that share a row of the mask


def kept(seed: Tensor, shape: Any, p: float) -> Tensor:
    """bool of a shape: element i, counted in order, is the mask's row i // ROW, column i % ROW."""
    count = 1
    for size in shape:
        count = count * size
    rows = (count + ROW - 1) // ROW
    head = torch.zeros((), dtype=torch.int64, device=seed.device)
    return keep(seed, head, rows, min(count, ROW), p).flatten()[:count].reshape(shape)


def dropout_add(input: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    """residual + input, where it is kept, / (1 - p)"""
    wide = torch.promote_types(input.dtype, torch.float32)
    scale = torch.where(kept(seed, input.shape, p), factor(p), 0.0).to(wide)
    return (residual.to(wide) + input.to(wide) * scale).to(input.dtype)


def dropout_add_backward(
    grad_output: Tensor, seed: Tensor, shape: Any, dtype: torch.dtype, p: float, needs: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient where input was kept, and all of it."""
    dx = None
    if needs[0]:
        wide = torch.promote_types(grad_output.dtype, torch.float32)
        scale = torch.where(kept(seed, shape, p), factor(p), 0.0).to(wide)
        dx = (grad_output.to(wide) * scale).to(dtype)
    return dx, grad_output.to(dtype) if needs[1] else None
