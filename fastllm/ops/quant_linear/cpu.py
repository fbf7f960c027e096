"""quant_linear on the CPU: codes are read where they lie, whatever the number of tokens."""

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import adjacent, empty
from fastllm.ops.quant.layout import KINDS

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_BLOCK = 1 << 24  # values of the weight that backward holds at a time


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
    k, n = input.shape[-1], codes.shape[0]
    out = empty((*input.shape[:-1], n), input.dtype)
    if k == 0:
        return out.zero_() if bias is None else out.copy_(bias)
    x = adjacent(input if input.dim() == 2 else input.reshape(-1, k))
    bias = None if bias is None else bias.contiguous()
    weight, held = _weight(codes, scales, zeros, code, group, k)
    given = 0.0 if act_scale is None else float(act_scale)
    _C.qgemm(
        CODES[input.dtype], activations, x.data_ptr(), x.shape[0], x.stride(0), *weight,
        0 if bias is None else bias.data_ptr(), given, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    del held
    return out


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
    """(grad_input, grad_bias): the weight is dequantized some rows at a time."""
    n, k = codes.shape[0], input.shape[-1]
    dy, dx, db = grad_output.reshape(-1, n), None, None
    if needs[0]:
        dx = _grad_input(dy, codes, scales, zeros, code, group, k, input.dtype).view(input.shape)
    if needs[1] and bias is not None:
        db = dy.sum(0)
    return dx, db


def _grad_input(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    n = codes.shape[0]
    if 0 in (n, k, dy.shape[0]):
        return torch.zeros(dy.shape[0], k, dtype=dtype)
    step = max(1, _BLOCK // k)
    if n <= step:
        return torch.mm(dy, weight_rows(codes, scales, zeros, code, group, k, dtype, 0, n))
    total = torch.zeros(dy.shape[0], k)
    for start in range(0, n, step):
        rows = min(step, n - start)
        w = weight_rows(codes, scales, zeros, code, group, k, dtype, start, rows)
        total += torch.mm(dy[:, start : start + rows], w)
    return total.to(dtype)


def weight_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
    start: int,
    rows: int,
) -> Tensor:
    """Rows [start, start + rows) of the weight as numbers [rows, K]."""
    out = empty((rows, k), dtype)
    weight, held = _weight(codes, scales, zeros, code, group, k)
    _C.qgemm_decode(CODES[dtype], *weight, start, rows, out.data_ptr(), torch.get_num_threads())
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


def supports(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
) -> str | None:
    """Why these arguments are not served, or None."""
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in CODES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    if scales.dtype not in _SCALES:
        return f"scales of {str(scales.dtype).removeprefix('torch.')}: computed by torch"
    if abs(group) > 1 and group % 32:
        return f"{KINDS[code]} in groups of {group}: no multiple of 32"
    return None


BACKEND: Backend = Backend("cpu", quant_linear, quant_linear_backward, supports)
