"""quant_linear in Triton: fastllm.kernels.quant_matmul, imported by the first call."""

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.triton import available
from fastllm.ops.matmul.triton import supports as supports_input
from fastllm.ops.quant.layout import KINDS, TABLES
from fastllm.ops.quant_linear import reference, triton_cuts
from fastllm.ops.quant_linear.outliers import split
from fastllm.ops.quant_linear.spec import FLOAT, Terms


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.quant_matmul")


@functools.cache
def _table(code: int, device: torch.device) -> Tensor | None:
    """What the codes of nf4 and fp4 stand for."""
    values = TABLES.get(code)
    return None if values is None else torch.tensor(values, device=device)


def quant_linear(input: Tensor, *rest: Any) -> Tensor:
    terms = Terms(*rest)
    if terms.outlier_threshold and (made := split(quant_linear, input, terms)) is not None:
        return made
    codes, scales, zeros, code, group = terms.weight
    k, n = input.shape[-1], codes.shape[0]
    shape = (*input.shape[:-1], n)
    if k == 0:
        return reference.quant_linear(input, *rest)
    x = input.reshape(-1, k)
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = codes if codes.stride(1) == 1 else codes.contiguous()
    zeros = None if zeros is None or not zeros.numel() else zeros.contiguous()
    run, token_scales = _kernels(), None
    if terms.activations != FLOAT:
        given = terms.act_scale
        given = None if given is None else given.to(input.device, torch.float32)
        x, token_scales = run.quantize_tokens(x, given)
    y = run.quant_matmul(
        x,
        codes,
        scales.contiguous(),
        zeros,
        None if terms.bias is None else terms.bias.contiguous(),
        code,
        group,
        k,
        table=_table(code, input.device),
        token_scales=token_scales,
        dtype=input.dtype,
        activation=terms.activation,
        config=triton_cuts.pick(x, n, code, group, input.dtype),
    )
    return y.view(shape)


def quant_linear_backward(
    grad_output: Tensor, input: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """(grad_input, grad_bias): the weight is dequantized, the product is torch's."""
    *given, needs = rest
    terms, k = Terms(*given), input.shape[-1]
    if terms.activation is not None:
        grad_output = reference.grad_pre(quant_linear, grad_output, input, terms)
    dy, dx, db = grad_output.reshape(-1, terms.codes.shape[0]), None, None
    if needs[0]:
        w = reference.weight(*terms.weight, k, dy.dtype)
        dx = torch.mm(dy, w).view(input.shape).to(input.dtype)
    if needs[1] and terms.bias is not None:
        db = dy.sum(0).to(terms.bias.dtype)
    return dx, db


def supports(input: Tensor, *rest: Any) -> str | None:
    """Why these arguments are not served, or None."""
    codes, scales, code, group = rest[0], rest[1], rest[5], rest[6]
    if abs(group) > 1 and group % 32:
        return f"{KINDS[code]} in groups of {group}: no multiple of 32"
    if scales.dtype == torch.float64:
        return "scales of float64: computed by torch"
    return supports_input(input, codes)


BACKEND: Backend = Backend("triton", quant_linear, quant_linear_backward, supports, available)
