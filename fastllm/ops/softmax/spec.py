"""The contract of softmax and log_softmax."""

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

SCHEMA = Schema(
    params="Tensor input, int dim",
    returns="Tensor",
    backward_params="Tensor grad_output, Tensor output, int dim",
    backward_returns="Tensor",
)


def check(input: Tensor, dim: int) -> None:
    """Raises where torch would: the message names the argument."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, found {type(input).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating point tensor, found {describe(input)}")
    count = max(1, input.dim())
    if not -count <= dim < count:
        raise IndexError(f"dim: expected {-count} to {count - 1}, found {dim}")


def fake(input: Tensor, dim: int) -> Tensor:
    """One output like the input, contiguous."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def cost(input: Tensor, dim: int) -> Cost:
    """Forward reads x and writes y; backward reads dy and y and writes dx."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(2 * size, 3 * size, 4 * n, 4 * n)


def sizes(input: Tensor, dim: int) -> tuple[int, int, int]:
    """[outer, n, inner] of a contiguous tensor around `dim`."""
    if input.dim() == 0:
        return 1, 1, 1
    dim %= input.dim()
    outer = inner = 1
    for size in input.shape[:dim]:
        outer *= size
    for size in input.shape[dim + 1 :]:
        inner *= size
    return outer, input.shape[dim], inner
