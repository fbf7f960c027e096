"""quant_linear in plain torch: any float dtype, differentiable, in float64 the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.ops.matmul.reference import activate, derivative
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant_linear.outliers import loud
from fastllm.ops.quant_linear.spec import FLOAT, Terms


def quant_linear(input: Tensor, *rest: Any) -> Tensor:
    """act(x W^T + b) with W = dequantized codes, x rounded to int8 a token where asked for."""
    terms, x = Terms(*rest), _wide(input)
    w = weight(*terms.weight, x.shape[-1], x.dtype)
    if terms.activations == FLOAT:
        y = x @ w.t()
    else:
        quiet, kept = x, None
        if terms.outlier_threshold:
            above = loud(x, terms.outlier_threshold)
            quiet, kept = torch.where(above, 0.0, x), torch.where(above, x, 0.0)
        rounded, scale = quantize_tokens(quiet, terms.act_scale)
        y = (rounded @ w.t()) * scale
        if x.requires_grad:  # straight through the rounding
            plain = quiet @ w.t()
            y = y.detach() + (plain - plain.detach())
        y = y if kept is None else y + kept @ w.t()
    y = y if terms.bias is None else y + terms.bias.to(y.dtype)
    return activate(y, terms.activation).to(input.dtype)


def quant_linear_backward(
    grad_output: Tensor, input: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """dz = dy act'(z); dx = dz W, as if the activations had not been rounded; db = sum dz."""
    *given, needs = rest
    terms, dz, dx, db = Terms(*given), _wide(grad_output), None, None
    if terms.activation is not None:
        dz = grad_pre(quant_linear, grad_output, input, terms)
    if needs[0]:
        w = weight(*terms.weight, input.shape[-1], dz.dtype)
        dx = (dz @ w).to(input.dtype)
    if needs[1] and terms.bias is not None:
        db = dz.reshape(-1, dz.shape[-1]).sum(0).to(terms.bias.dtype)
    return dx, db


def grad_pre(
    product: Callable[..., Tensor], grad_output: Tensor, input: Tensor, terms: Terms
) -> Tensor:
    """dy act'(z) with z = x W^T + b, computed again by `product`; float32 of 16-bit tensors."""
    bias = None if terms.bias is None else _wide(terms.bias)
    z = product(_wide(input), *terms._replace(bias=bias, activation=None))
    return _wide(grad_output) * derivative(z, terms.activation)


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
