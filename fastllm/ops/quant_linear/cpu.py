"""quant_linear on the CPU: codes are read where they lie, whatever the number of tokens."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import adjacent, empty
from fastllm.ops.matmul.products import ACTIVATION_CODES
from fastllm.ops.quant.layout import KINDS
from fastllm.ops.quant_linear import reference
from fastllm.ops.quant_linear.outliers import split
from fastllm.ops.quant_linear.spec import Terms

Weight = tuple[Tensor, Tensor, Tensor | None, int, int]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_BLOCK = 1 << 24  # values of the weight that backward holds at a time


def quant_linear(input: Tensor, *rest: Any) -> Tensor:
    terms = Terms(*rest)
    if terms.outlier_threshold:
        return split(quant_linear, input, terms)
    k, n = input.shape[-1], terms.codes.shape[0]
    out = empty((*input.shape[:-1], n), input.dtype)
    if k == 0:
        return out.copy_(reference.quant_linear(input, *rest))
    x = adjacent(input if input.dim() == 2 else input.reshape(-1, k))
    bias = None if terms.bias is None else terms.bias.contiguous()
    weight, held = _weight(*terms.weight, k)
    given = 0.0 if terms.act_scale is None else float(terms.act_scale)
    _C.qgemm(
        CODES[input.dtype], terms.activations, x.data_ptr(), x.shape[0], x.stride(0), *weight,
        0 if bias is None else bias.data_ptr(), given, ACTIVATION_CODES[terms.activation],
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del held
    return out


def quant_linear_backward(
    grad_output: Tensor, input: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """(grad_input, grad_bias): the weight is dequantized some rows at a time."""
    *given, needs = rest
    terms, k = Terms(*given), input.shape[-1]
    if terms.activation is not None:
        grad_output = reference.grad_pre(quant_linear, grad_output, input, terms)
    dy, dx, db = grad_output.reshape(-1, terms.codes.shape[0]), None, None
    if needs[0]:
        dx = grad_input(dy, terms.weight, k, dy.dtype).view(input.shape).to(input.dtype)
    if needs[1] and terms.bias is not None:
        db = dy.sum(0).to(terms.bias.dtype)
    return dx, db


def grad_input(dy: Tensor, weight: Weight, k: int, dtype: torch.dtype) -> Tensor:
    """dy [M, N] W [N, K]: `weight` as Terms has it."""
    n = weight[0].shape[0]
    if 0 in (n, k, dy.shape[0]):
        return torch.zeros(dy.shape[0], k, dtype=dtype)
    step = max(1, _BLOCK // k)
    if n <= step:
        return torch.mm(dy, weight_rows(weight, k, dtype, 0, n))
    total = torch.zeros(dy.shape[0], k)
    for start in range(0, n, step):
        rows = min(step, n - start)
        w = weight_rows(weight, k, dtype, start, rows)
        total += torch.mm(dy[:, start : start + rows], w)
    return total.to(dtype)


def weight_rows(weight: Weight, k: int, dtype: torch.dtype, start: int, rows: int) -> Tensor:
    """Rows [start, start + rows) of the weight as numbers [rows, K]."""
    out = empty((rows, k), dtype)
    given, held = _weight(*weight, k)
    _C.qgemm_decode(CODES[dtype], *given, start, rows, out.data_ptr(), torch.get_num_threads())
    del held
    return out


def _weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, code: int, group: int, k: int
) -> tuple[tuple, tuple]:
    """The weight as the kernels take it, and the tensors that have to outlive the call."""
    if codes.stride(-1) != 1:
        codes = codes.contiguous()
    scales = scales.contiguous()
    zeros = None if zeros is None or not zeros.numel() else zeros.contiguous()
    block = -group if group < -1 else 1
    across = scales.shape[-1] if scales.dim() == 2 else 0
    layout = (
        code, codes.data_ptr(), codes.shape[0], k, codes.stride(0), scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(), _SCALES[scales.dtype], across, block,
        max(group, 0) if group >= -1 else block,
    )  # fmt: skip
    return layout, (codes, scales, zeros)


def supports(input: Tensor, *rest: Any) -> str | None:
    """Why these arguments are not served, or None."""
    scales, code, group = rest[1], rest[5], rest[6]
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in CODES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    if scales.dtype not in _SCALES:
        return f"scales of {str(scales.dtype).removeprefix('torch.')}: computed by torch"
    if abs(group) > 1 and group % 32:
        return f"{KINDS[code]} in groups of {group}: no multiple of 32"
    return None


BACKEND: Backend = Backend(
    "cpu", quant_linear, quant_linear_backward, supports, fast=_C.fast_quant_linear
)
