"""Codes and fake quantization in given ranges, and the gradients of LSQ (Esser et al. 2019)."""

import triton
import triton.language as tl
from fastllm.kernels.device import on
from fastllm.kernels.quant import (
    _LEAST,
    _MOST,
    _PACKED,
    _between,
    _bits,
    _codes,
    _number,
    _plain,
    _store_codes,
    _values,
    most_of,
    table_of,
)


@triton.jit
def _given_kernel(
    x_ptr,
    scales_ptr,
    grad_ptr,
    out_ptr,
    parts_ptr,
    made_ptr,
    table_ptr,
    units,
    size,
    cols,
    across,
    height,
    low,
    high,
    most,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns ROWS groups of `size`, `across` in a row; of a block, a row. GROUP: 0 one
    # scale, 1 along rows, 2 in blocks.
    # With made: codes, and NaN among those scales for groups that hold NaN or infinity. With grad:
    # the input's gradient, and sums by groups of the scales'.
    unit = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    row = unit // across
    start = (unit % across) * size
    count = tl.where(unit < units, tl.minimum(size, cols - start), 0)
    lane = tl.arange(0, BLOCK)[None, :]
    which = unit * 0
    if GROUP == 1:
        which = unit
    elif GROUP == 2:
        above = row // height * tl.cdiv(height, size) + row % height // size
        which = above * across + unit % across
    scale = tl.load(scales_ptr + which, mask=unit < units, other=0.0).to(tl.float32)
    eight = tl.zeros([ROWS, 1], tl.float32) + 8.0
    total = tl.zeros([ROWS, 1], tl.float64)
    for first in range(0, size, BLOCK):
        at = row * cols + start + first + lane
        mask = first + lane < count
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        code = _codes(x, scale, eight, table_ptr, KIND, False)
        number = _values(code, eight, table_ptr, KIND)
        if made_ptr is not None:
            _store_codes(out_ptr, row, start + first + lane, mask, code, cols, PACKED)
            odd = tl.where(mask & ~(tl.abs(x) < float("inf")), 1, 0)
            odd = tl.max(odd, axis=1, keep_dims=True) > 0
            none = tl.zeros([ROWS, 1], tl.float32) + float("nan")
            if made_ptr.dtype.element_ty == tl.int16:
                none = tl.zeros([ROWS, 1], tl.int32) + 0x7FC0
            tl.store(made_ptr + which, none.to(made_ptr.dtype.element_ty), mask=odd)
        elif grad_ptr is None:
            value = _between(number * scale, -most, most)
            value = tl.where(tl.abs(x) < float("inf"), value, float("nan"))
            tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            q = tl.div_rn(x, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(x))
            q = tl.where(scale == 0, 0.0, q)
            grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
            rest = number - q
            if KIND != 2 and KIND != 3:  # exact: numbers of eight bits, the scale's parts of twelve
                first_bits = _number(_bits(scale) & ~0xFFF)
                rest = (number * first_bits - x) + number * (scale - first_bits)
                rest = tl.div_rn(rest, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(x))
            slope = tl.where(q < low, low, tl.where(q > high, high, rest))
            part = tl.where(mask, grad.to(tl.float64) * slope.to(tl.float64), 0.0)
            total += tl.sum(part, axis=1, keep_dims=True)  # they cancel
            grad = tl.where((q < low) | (q > high), 0.0, grad)
            tl.store(out_ptr + at, grad.to(out_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        tl.store(parts_ptr + unit, total.to(tl.float32), mask=unit < units)


def encode_given(x, scales, codes, made, kind, group, values):
    """Codes of x in the range of scales; NaN into made, a copy of them, where x is no number."""
    _run(x, scales, None, _plain(codes), None, _plain(made), kind, group, values, (0.0, 0.0))


def fake_given(x, scales, grad, out, parts, kind, group, values, ends):
    """What is nearest to x in the range of the given scales, into out [.., K].

    With grad, out is the gradient of x, and parts [.., groups in a row] are sums for the scales'.
    ends: the least and the largest number of the kind.
    """
    _run(x, scales, grad, out, parts, None, kind, group, values, ends)


def _run(x, scales, grad, out, parts, made, kind, group, values, ends):
    cols = x.shape[-1]
    if not x.numel():
        return
    rows = x.numel() // cols
    size = abs(group) if group not in (0, -1) else cols
    mode = 0 if group == -1 else 1 if group >= 0 else 2
    across = triton.cdiv(cols, size)
    block = min(max(16, triton.next_power_of_2(size)), _MOST)
    owned = max(1, _LEAST // block)
    with on(x.device):
        _given_kernel[(triton.cdiv(rows * across, owned),)](
            x, scales, grad, out, parts, made, table_of(values, x.device), rows * across, size,
            cols, across, x.shape[-2] if x.dim() > 1 else 1, *ends, most_of(x), kind, mode,
            kind in _PACKED, owned, block, num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip
