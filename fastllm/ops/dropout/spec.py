"""What dropout_add takes: schema, checks, shapes of results, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

SCHEMA = Schema(
    "Tensor input, Tensor residual, Tensor seed, float p",
    "Tensor",
    "Tensor grad_output, Tensor seed, SymInt[] shape, ScalarType dtype, float p",
    "(Tensor, Tensor)",
)


def check(input: Tensor, residual: Tensor, seed: Tensor, p: float) -> None:
    """TypeError or ValueError that names the argument."""
    for name, tensor in (("input", input), ("residual", residual)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            found = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating point Tensor, found {found}")
    if residual.shape != input.shape or residual.dtype != input.dtype:
        raise ValueError(
            f"residual: expected the shape and dtype of input ({describe(input)}), "
            f"found {describe(residual)}"
        )
    if residual.device != input.device:
        raise ValueError(
            f"residual: expected a Tensor on {input.device}, found {describe(residual)}"
        )
    if not (isinstance(seed, Tensor) and seed.dtype == torch.int64 and seed.numel() == 1):
        raise ValueError(f"seed: expected an int64 tensor of shape [1], found {describe(seed)}")
    check_probability(p)


def check_probability(p: float) -> None:
    """ValueError unless it is one."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected 0 to 1, found {p}")


def fake(input: Tensor, *_: Any) -> Tensor:
    """Like input, contiguous."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def fake_backward(seed: Tensor, shape: Any, dtype: torch.dtype, p: float) -> tuple[Tensor, Tensor]:
    """The gradients of input and residual."""
    return seed.new_empty(shape, dtype=dtype), seed.new_empty(shape, dtype=dtype)


def cost(input: Tensor, *_: Any) -> Cost:
    """Forward reads two and writes one; backward reads one and writes one."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(3 * size, 2 * size, 10 * n, 10 * n)
