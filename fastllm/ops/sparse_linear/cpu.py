"""sparse_linear on the CPU: a few tokens read half of the weight, many have it expanded once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import adjacent, empty
from fastllm.ops.quant import cpu as quant
from fastllm.ops.quant.layout import INT8
from fastllm.ops.quant_linear import cpu as quantized
from fastllm.ops.sparse_linear import layout
from fastllm.ops.sparse_linear.spec import DYNAMIC, FLOATS

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
THIN = {torch.float32: 32, torch.int8: 16}
"""The most tokens that meet the weight as it lies (8 in 16 bits): beyond, dense products win."""


def sparse_linear(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> Tensor:
    k, n = input.shape[-1], values.shape[0]
    tokens = input.numel() // max(1, k)
    if tokens > THIN.get(values.dtype, 8) and n and k:
        return _dense(input, values, kept, scales, bias, activations)
    out = empty((*input.shape[:-1], n), input.dtype)
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    x = adjacent(layout.rows(input))
    token_scales = None
    if activations == DYNAMIC:
        x, token_scales, _ = quant.quantize(x.contiguous(), INT8, 0, True)
    values, kept = values.contiguous(), kept.contiguous()
    bias = None if bias is None else bias.contiguous()
    scales = None if scales is None else scales.contiguous()
    _C.sparse_matmul(
        _CODES[x.dtype], _CODES[input.dtype], x.data_ptr(), _pointer(token_scales), tokens,
        x.stride(0), _CODES[values.dtype], values.data_ptr(), kept.data_ptr(), _pointer(scales),
        n, k, _pointer(bias), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


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
    if needs[0] and scales is not None:
        unit = scales.unsqueeze(1)
        codes = expand(values, kept, k)
        dx = quantized.grad_input(dy, (codes, unit, None, INT8, 0), k, input.dtype)
    elif needs[0]:
        dx = torch.mm(dy, expand(values, kept, k))
    dx = None if dx is None else dx.view(input.shape)
    return dx, *layout.grad_parameters(dy, input, kept, scales, bias, needs)


def expand(values: Tensor, kept: Tensor, k: int) -> Tensor:
    """The whole weight [N, K] in the dtype of its values, scales left out."""
    values, kept = values.contiguous(), kept.contiguous()
    out = empty((values.shape[0], k), values.dtype)
    _C.sparse_expand(
        _CODES[values.dtype], values.data_ptr(), kept.data_ptr(), *out.shape, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _dense(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> Tensor:
    k = input.shape[-1]
    dense = expand(values, kept, k)
    if scales is None:
        return F.linear(input, dense, bias)
    unit = scales.unsqueeze(1)
    return quantized.quant_linear(input, dense, unit, None, bias, None, INT8, 0, activations)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def supports(
    input: Tensor, values: Tensor, kept: Tensor, scales: Tensor | None, *_: object
) -> str | None:
    """Why these arguments are not served, or None."""
    if scales is not None and scales.dtype != torch.float32:
        return "scales of float64: computed by torch"
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in FLOATS[:3]:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    return None


BACKEND: Backend = Backend("cpu", sparse_linear, sparse_linear_backward, supports)
