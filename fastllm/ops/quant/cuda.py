"""dequantize in CUDA C++ (csrc/cuda/quant.cu), and how the kernels there see a weight of codes."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.cuda import _CODES, available
from fastllm.ops.quant import layout, reference

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

KINDS = (layout.INT8, layout.INT4, layout.NF4, layout.FP4)
DEVICES = ("cuda",)


@functools.cache
def _table(code: int, device: torch.device) -> Tensor | None:
    """What the codes of nf4 and fp4 stand for."""
    values = layout.TABLES.get(code)
    return None if values is None else torch.tensor(values, device=device)


def weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, code: int, group: int, k: int
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A weight as the kernels take it, and the tensors that have to outlive the launch."""
    scales = scales.contiguous()
    zeros = None if zeros is None or not zeros.numel() else zeros.contiguous()
    table = _table(code, codes.device)
    given = (
        code, codes.data_ptr(), math.prod(codes.shape[:-1]), k, codes.stride(-2), scales.data_ptr(),
        address(zeros), _CODES[scales.dtype], 0 if group == -1 else scales.shape[-1],
        group if group > 0 else k, address(table),
    )  # fmt: skip
    return given, (scales, zeros, table)


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def place(device: torch.device) -> tuple[int, int]:
    """The device's number and its current stream."""
    index = device.index or 0
    stream = torch._C._cuda_getCurrentRawStream(index) if device.type == "cuda" else 0
    return index, stream


def misfit(codes: Tensor, scales: Tensor, code: int, group: int, k: int) -> str | None:
    """Why the kernels do not take such a weight, or None."""
    if codes.device.type not in DEVICES or scales.device != codes.device:
        return f"codes on {codes.device}, scales on {scales.device}"
    if code not in KINDS:
        return f"{layout.KINDS[code]}: computed by Triton"
    if scales.dtype not in _CODES:
        return f"{scales.dtype} scales: computed by torch"
    if k == 0 or k % 32 or group < -1 or (group > 0 and group % 32):
        return f"K = {k} in groups of {group}: no multiples of 32"
    if codes.dim() < 2 or not codes.is_contiguous() or codes.data_ptr() % 16:
        return "codes: no rows that start on 16 bytes"
    return None if codes.numel() else "codes: empty"


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    out = codes.new_empty((*codes.shape[:-1], k), dtype=dtype)
    given, held = weight(codes, scales, zeros, code, group, k)
    _cuda.quant_dequantize(_CODES[dtype], *given, out.data_ptr(), *place(codes.device))
    del held
    return out


def _supports(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in _CODES:
        return f"{dtype}: computed by torch"
    if codes.numel() >= 2**31 * 16:
        return "codes: more than a grid holds"
    return misfit(codes, scales, code, group, k)


BACKENDS: dict[str, Backend] = {
    "dequantize": Backend("cuda", dequantize, reference.dequantize_backward, _supports, available),
}
