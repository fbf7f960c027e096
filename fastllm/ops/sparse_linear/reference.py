"""sparse_linear in plain torch: any float dtype, differentiable, in float64 the oracle."""

import torch
from torch import Tensor

from fastllm.ops.quant_linear.reference import _wide, quantize_tokens
from fastllm.ops.sparse_linear import layout
from fastllm.ops.sparse_linear.spec import DYNAMIC


def sparse_linear(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> Tensor:
    """x W^T + b with W [N, K] of zeros but for what is kept."""
    x = _wide(input)
    w = weight(values, kept, scales, x.shape[-1], x.dtype)
    if activations == DYNAMIC:
        rounded, scale = quantize_tokens(x, None)
        y = (rounded @ w.t()) * scale
        if x.requires_grad:  # straight through the rounding
            plain = x @ w.t()
            y = y.detach() + (plain - plain.detach())
    else:
        y = x @ w.t()
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(input.dtype)


def sparse_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx = dy W, d values = (dy^T x) where W is kept, db = sum dy."""
    dy, dx, dv, db = _wide(grad_output), None, None, None
    flat = layout.rows(dy)
    if needs[0]:
        w = weight(values, kept, scales, input.shape[-1], dy.dtype)
        dx = (dy @ w).to(input.dtype)
    if needs[1] and scales is None:
        x = layout.rows(_wide(input))
        dv = layout.pick(flat.t() @ x, kept).to(values.dtype)
    if needs[2] and bias is not None:
        db = flat.sum(0).to(bias.dtype)
    return dx, dv, db


def weight(
    values: Tensor, kept: Tensor, scales: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    """[N, K] in `dtype`"""
    dense = layout.expand(values.to(dtype), kept, k)
    return dense if scales is None else dense * scales.to(dtype)[:, None]
