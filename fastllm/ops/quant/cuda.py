"""quantize and dequantize in CUDA C++ (csrc/cuda/quant.cu), and how kernels there see a weight."""

import functools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.cuda import _CODES, available
from fastllm.ops.quant import layout, reference, spec

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

KINDS = (layout.INT8, layout.INT4, layout.NF4, layout.FP4)
DEVICES = ("cuda",)
STEP = 8  # neighbours that quantize takes at a time


@functools.cache
def _table(code: int, device: torch.device) -> Tensor | None:
    """What the codes of nf4 and fp4 stand for."""
    values = layout.TABLES.get(code)
    return None if values is None else torch.tensor(values, device=device)


@functools.cache
def _thresholds(code: int) -> tuple[bytes, int]:
    """15 numbers between those of nf4 or fp4, and the codes of these by size, a nibble each."""
    if code not in layout.TABLES:
        return b"", 0
    bounds, order = layout.thresholds(code)
    above = [math.inf] * (15 - len(bounds))
    nibbles = sum(place << 4 * i for i, place in enumerate(order.tolist()))
    return struct.pack("15f", *bounds.tolist(), *above), nibbles


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


def quantize(
    input: Tensor, code: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, k = input.contiguous(), input.shape[-1]
    codes, scales, zeros = spec.quantized(x, code, group, symmetric)
    _cuda.quantize(
        _CODES[x.dtype], code, x.data_ptr(), x.numel() // k, k, min(group or k, k),
        codes.data_ptr(), scales.data_ptr(), 0 if symmetric else zeros.data_ptr(),
        *_thresholds(code), *place(x.device),
    )  # fmt: skip
    return codes, scales, zeros


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


def _supports_quantize(input: Tensor, code: int, group: int, symmetric: bool) -> str | None:
    if input.device.type not in DEVICES:
        return f"input on {input.device}"
    if code not in KINDS or group < 0:
        return f"{layout.KINDS[code]} in groups of {group}: computed by Triton"
    if input.dtype not in _CODES:
        return f"{input.dtype} input: computed by torch"
    k = input.shape[-1]
    if k % STEP or group % STEP:
        return f"K = {k} in groups of {group}: no multiples of {STEP}"
    if input.is_contiguous() and input.data_ptr() % 16:
        return "input: does not start on 16 bytes"
    if input.numel() // STEP >= 2**31:
        return "input: more than a grid holds"
    return None if input.numel() else "input: empty"


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
    "quantize": Backend(
        "cuda", quantize, reference.quantize_backward, _supports_quantize, available
    ),
    "dequantize": Backend("cuda", dequantize, reference.dequantize_backward, _supports, available),
}
