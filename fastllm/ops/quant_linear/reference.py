"""quant_linear in plain torch: any float dtype, differentiable, in float64 the oracle."""

import torch
from torch import Tensor

from fastllm.ops.quant import reference as quant
from fastllm.ops.quant_linear.spec import FLOAT


def quant_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
) -> Tensor:
    """x W^T + b with W = dequantized codes, x rounded to int8 a token where asked for."""
    x = _wide(input)
    w = weight(codes, scales, zeros, code, group, x.shape[-1], x.dtype)
    if activations == FLOAT:
        y = x @ w.t()
    else:
        rounded, scale = quantize_tokens(x, act_scale)
        y = (rounded @ w.t()) * scale
        if x.requires_grad:  # straight through the rounding
            plain = x @ w.t()
            y = y.detach() + (plain - plain.detach())
    y = y if bias is None else y + bias.to(y.dtype)
    return y.to(input.dtype)


def quant_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx = dy W, as if the activations had not been rounded; db = sum dy."""
    dy, dx, db = _wide(grad_output), None, None
    if needs[0]:
        w = weight(codes, scales, zeros, code, group, input.shape[-1], dy.dtype)
        dx = (dy @ w).to(input.dtype)
    if needs[1] and bias is not None:
        db = dy.reshape(-1, dy.shape[-1]).sum(0).to(bias.dtype)
    return dx, db


def weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """[N, K] in `dtype`"""
    none = scales.new_empty(0) if zeros is None else zeros
    return quant.dequantize(codes, scales, none, code, group, k, dtype).to(dtype)


def quantize_tokens(x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(integers of +-127 in x's dtype, their scale), NaN for a token that is not finite."""
    if x.shape[-1] == 0:
        return x, x.new_zeros((*x.shape[:-1], 1))
    top = x.detach().abs().amax(-1, keepdim=True)
    scale = top / 127 if act_scale is None else act_scale.to(x.dtype).expand_as(top)
    safe = torch.where((scale == 0) | ~top.isfinite(), 1.0, scale)
    codes = (x.detach().nan_to_num() / safe).round().clamp(-127, 127)
    return codes, torch.where(top.isfinite(), scale, torch.nan)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
