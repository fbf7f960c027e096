"""sparse_linear in Triton: fastllm.kernels.sparse_matmul, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.triton import available
from fastllm.ops.matmul.triton import supports as supports_input
from fastllm.ops.sparse_linear import layout, reference
from fastllm.ops.sparse_linear.spec import DYNAMIC


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.sparse_matmul")


def sparse_linear(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> Tensor:
    k, n = input.shape[-1], values.shape[0]
    shape = (*input.shape[:-1], n)
    if k == 0:
        zero = input.new_zeros(shape)
        return zero if bias is None else zero + bias
    x = layout.rows(input)
    x = x if x.stride(1) == 1 else x.contiguous()
    run, token_scales = _kernels(), None
    if activations == DYNAMIC:
        x, token_scales = run.quantize_tokens(x)
    y = run.sparse_matmul(
        x,
        values.contiguous(),
        kept.contiguous(),
        None if scales is None else scales.contiguous(),
        None if bias is None else bias.contiguous(),
        token_scales=token_scales,
        dtype=input.dtype,
    )
    return y.view(shape)


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
    """(grad_input, grad_values, grad_bias): products are torch's, with the whole weight."""
    k = input.shape[-1]
    dy, dx = layout.rows(grad_output), None
    if needs[0]:
        w = reference.weight(values, kept, scales, k, input.dtype)
        dx = torch.mm(dy, w).view(input.shape)
    return dx, *layout.grad_parameters(dy, input, kept, scales, bias, needs)


def supports(
    input: Tensor, values: Tensor, kept: Tensor, scales: Tensor | None, *_: object
) -> str | None:
    """Why these arguments are not served, or None."""
    if scales is not None and scales.dtype != torch.float32:
        return "scales of float64: computed by torch"
    return supports_input(input, values)


BACKEND: Backend = Backend("triton", sparse_linear, sparse_linear_backward, supports, available)
