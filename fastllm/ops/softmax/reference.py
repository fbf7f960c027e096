"""softmax and log_softmax in plain torch: any float dtype, differentiable, the float64 oracle."""

import torch
from torch import Tensor


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def softmax(input: Tensor, dim: int) -> Tensor:
    """y = e^x / sum(e^x)"""
    return _wide(input).softmax(dim).to(input.dtype)


def log_softmax(input: Tensor, dim: int) -> Tensor:
    """y = x - log(sum(e^x))"""
    return _wide(input).log_softmax(dim).to(input.dtype)


def softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """dx = y (dy - sum(dy y))"""
    dy, y = _wide(grad_output), _wide(output)
    return ((y * (dy - (dy * y).sum(dim, keepdim=True))).to(output.dtype),)


def log_softmax_backward(
    grad_output: Tensor, output: Tensor, dim: int, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """dx = dy - e^y sum(dy)"""
    dy, y = _wide(grad_output), _wide(output)
    return ((dy - y.exp() * dy.sum(dim, keepdim=True)).to(output.dtype),)
