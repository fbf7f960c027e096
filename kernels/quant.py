"""quantize and dequantize: floats to 8- and 4-bit codes with scales, and back.

Layout: fastllm.ops.quant.layout; one code: fastllm.kernels.quant_codes.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on
from fastllm.kernels.quant_codes import (
    _between,
    _bf16,
    _bits,
    _codes,
    _number,
    _round,
    _values,
    table_of,
)

_PACKED = (1, 2, 3)
_LARGEST = {0: 127.0, 2: 1.0, 3: 1.0, 4: 448.0, 5: 57344.0, 6: 448.0}
_LEAST, _MOST = 256, 4096  # values of a program: of many short groups, of one long row


@triton.jit
def _scale(low, high, largest, KIND: tl.constexpr, ASYM: tl.constexpr):
    """(scale, what is stored of it, zero point) of groups from their extremes; inf: no number."""
    top = tl.maximum(high, -low)
    finite = (high == high) & (low == low) & (top < float("inf"))
    zero = tl.zeros_like(top)
    if KIND == 6:
        bits = _bits(top)
        byte = tl.maximum((bits >> 23) + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32) - 8, 0)
        stored = tl.where(finite, byte, 255)
        scale = _number(tl.where(stored == 0, 0x00400000, stored << 23))
        scale = tl.where(finite, tl.where(top > 0, scale, 0.0), float("nan"))
    elif KIND == 1:
        if ASYM:
            part = tl.zeros_like(top) + 15.0
            scale = tl.div_rn(high, part) - tl.div_rn(low, part)
        else:
            scale = tl.where(high >= -low, high, low) * -0.125
        stored = _bf16(tl.where(finite, scale, float("nan")))
        scale = _number(stored << 16)
        if ASYM:
            good = (scale != 0) & finite
            ratio = tl.div_rn(-low, tl.where(good, scale, 1.0))
            zero = tl.where(good, _round(_between(ratio, 0.0, 15.0)), 0.0)
    else:
        scale = tl.div_rn(top, tl.zeros_like(top) + largest)
        stored = tl.where(finite, scale, float("nan"))
        scale = stored
    return scale, stored, zero


@triton.jit
def _store_scale(scales_ptr, zeros_ptr, at, stored, zero, mask, ASYM: tl.constexpr):
    kind = scales_ptr.dtype.element_ty
    tl.store(scales_ptr + at, stored.to(kind), mask=mask)
    if ASYM:
        tl.store(zeros_ptr + at, _bf16(zero).to(kind), mask=mask)


@triton.jit
def _store_codes(ptr, row, col, mask, code, cols, PACKED: tl.constexpr):
    """Writes codes [R, C] of columns `col`, whose first is even; half as many bytes if PACKED."""
    kind = ptr.dtype.element_ty
    if PACKED:
        r: tl.constexpr = code.shape[0]
        c: tl.constexpr = code.shape[1] // 2
        even, odd = tl.split(tl.reshape(code, [r, c, 2]))
        first, _ = tl.split(tl.reshape(tl.broadcast_to(col, [r, 2 * c]), [r, c, 2]))
        inside, _ = tl.split(tl.reshape(mask.to(tl.int32), [r, c, 2]))
        byte = even | (odd << 4)
        at = row * ((cols + 1) // 2) + first // 2
        tl.store(ptr + at, byte.to(kind), mask=inside != 0)
    else:
        tl.store(ptr + row * cols + col, code.to(kind), mask=mask)


@triton.jit
def _store(
    ptr, row, col, mask, code, scale, zero, table_ptr, cols, most, KIND: tl.constexpr,
    ASYM: tl.constexpr, PACKED: tl.constexpr, FAKE: tl.constexpr,
):  # fmt: skip
    """Writes codes, or, if FAKE, what they stand for: no further from 0 than `most`."""
    if FAKE:
        value = _values(code, zero if ASYM else zero + 8.0, table_ptr, KIND) * scale
        value = _between(value, -most, most)
        tl.store(ptr + row * cols + col, value.to(ptr.dtype.element_ty), mask=mask)
    else:
        _store_codes(ptr, row, col, mask, code, cols, PACKED)


@triton.jit
def _extremes(x, low, high):
    """low and high moved to take in x [R, C], by rows; NaN in x ends up in high."""
    odd = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True) > 0
    clean = tl.where(x == x, x, 0.0)
    low = tl.minimum(low, tl.min(clean, axis=1, keep_dims=True))
    high = tl.maximum(high, tl.max(clean, axis=1, keep_dims=True))
    return low, tl.where(odd, float("inf"), high)


@triton.jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    given_ptr,
    table_ptr,
    units,
    size,
    cols,
    across,
    largest,
    most,
    KIND: tl.constexpr,
    ASYM: tl.constexpr,
    PACKED: tl.constexpr,
    FAKE: tl.constexpr,
    ONCE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns ROWS groups of `size`, `across` in a row. given: scale and zero point of all.
    unit = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    row = unit // across
    start = (unit % across) * size
    count = tl.where(unit < units, tl.minimum(size, cols - start), 0)
    lane = tl.arange(0, BLOCK)[None, :]
    x = tl.zeros([ROWS, BLOCK], tl.float32)
    if given_ptr is None:
        low = tl.zeros([ROWS, 1], tl.float32)
        high = tl.zeros([ROWS, 1], tl.float32)
        for first in range(0, size, BLOCK):
            at = row * cols + start + first + lane
            x = tl.load(x_ptr + at, mask=first + lane < count, other=0.0).to(tl.float32)
            low, high = _extremes(x, low, high)
        scale, stored, zero = _scale(low, high, largest, KIND, ASYM)
        _store_scale(scales_ptr, zeros_ptr, unit, stored, zero, unit < units, ASYM)
    else:
        scale = tl.load(given_ptr) + tl.zeros([ROWS, 1], tl.float32)
        zero = tl.load(given_ptr + 1) + tl.zeros([ROWS, 1], tl.float32)
    for first in range(0, size, BLOCK):
        if not ONCE:
            at = row * cols + start + first + lane
            x = tl.load(x_ptr + at, mask=first + lane < count, other=0.0).to(tl.float32)
        code = _codes(x, scale, zero, table_ptr, KIND, ASYM)
        mask = first + lane < count
        col = start + first + lane
        _store(
            codes_ptr, row, col, mask, code, scale, zero, table_ptr, cols, most, KIND, ASYM,
            PACKED, FAKE,
        )  # fmt: skip


@triton.jit
def _quantize_block_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    size,
    height,
    cols,
    largest,
    most,
    KIND: tl.constexpr,
    ASYM: tl.constexpr,
    PACKED: tl.constexpr,
    FAKE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (m, i, j) owns block (i, j) of size x size values of matrix m.
    across = tl.cdiv(cols, size)
    down = tl.cdiv(height, size)
    number = tl.program_id(0).to(tl.int64)
    top = number // across % down * size
    left = number % across * size
    lane = tl.arange(0, BLOCK)
    row = top + lane[:, None]
    col = left + lane[None, :]
    mask = (lane[:, None] < size) & (row < height) & (lane[None, :] < size) & (col < cols)
    row += number // (across * down) * height
    x = tl.load(x_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
    lows, highs = _extremes(x, tl.zeros([BLOCK, 1], tl.float32), tl.zeros([BLOCK, 1], tl.float32))
    low = tl.min(lows, axis=0, keep_dims=True)  # [1, 1]
    high = tl.max(highs, axis=0, keep_dims=True)
    scale, stored, zero = _scale(low, high, largest, KIND, ASYM)
    _store_scale(
        scales_ptr, zeros_ptr, number + tl.zeros([1, 1], tl.int64), stored, zero, None, ASYM
    )
    code = _codes(x, scale, zero, table_ptr, KIND, ASYM)
    _store(
        codes_ptr, row, col, mask, code, scale, zero, table_ptr, cols, most, KIND, ASYM, PACKED,
        FAKE,
    )  # fmt: skip


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    out_ptr,
    cols,
    size,
    height,
    largest,
    KIND: tl.constexpr,
    PACKED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (r, b) owns BLOCK columns of row r. GROUP: 0 one scale, 1 along rows, 2 in blocks.
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    col = first + tl.arange(0, BLOCK)
    mask = col < cols
    if PACKED:
        byte = first // 2 + tl.arange(0, BLOCK // 2)
        width = (cols + 1) // 2
        pair = tl.load(codes_ptr + row * width + byte, mask=byte < width, other=0).to(tl.int32)
        code = tl.reshape(tl.join(pair & 15, (pair >> 4) & 15), [BLOCK])
    else:
        code = tl.load(codes_ptr + row * cols + col, mask=mask, other=0).to(tl.int32) & 0xFF
    at = col * 0
    if GROUP == 1:
        at = row * tl.cdiv(cols, size) + col // size
    elif GROUP == 2:
        above = row // height * tl.cdiv(height, size) + row % height // size
        at = above * tl.cdiv(cols, size) + col // size
    scale = tl.load(scales_ptr + at, mask=mask, other=0)
    if scales_ptr.dtype.element_ty == tl.uint8:
        bits = scale.to(tl.int32)
        bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
        scale = _number(bits)
    zero = tl.zeros([BLOCK], tl.float32) + 8.0
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value = _values(code, zero, table_ptr, KIND) * scale.to(tl.float32)
    value = _between(value, -largest, largest)
    tl.store(out_ptr + row * cols + col, value.to(out_ptr.dtype.element_ty), mask=mask)


def _plain(tensor):
    """A tensor as kernels take it: bfloat16 and float8 as the integers of their bits."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    if tensor.element_size() == 1 and tensor.dtype != torch.int8:
        return tensor.view(torch.uint8)
    return tensor


def quantize(x, codes, scales, zeros, kind, group, values):
    """Codes of contiguous x [.., K] into codes, scales and zeros (None: symmetric).

    kind is a position in layout's KINDS; values are the 16 numbers of nf4 and fp4, else None.
    """
    places = (_plain(codes), _plain(scales), None if zeros is None else _plain(zeros))
    _quantize(x, places, kind, group, values, False)


def fake_own(x, out, scales, zeros, kind, group, values):
    """What the codes of x stand for into out; the rest as of quantize."""
    places = (out, _plain(scales), None if zeros is None else _plain(zeros))
    _quantize(x, places, kind, group, values, True)


def _quantize(x, places, kind, group, values, fake):
    cols, asym, packed = x.shape[-1], places[2] is not None, kind in _PACKED
    rows = x.numel() // max(1, cols)
    if not x.numel():
        return
    table, largest, most = table_of(values, x.device), _LARGEST.get(kind, 1.0), most_of(x)
    with on(x.device):
        if group < -1:
            block = triton.next_power_of_2(max(16, -group))
            height = x.shape[-2]
            count = rows // height * triton.cdiv(height, -group) * triton.cdiv(cols, -group)
            _quantize_block_kernel[(count,)](
                x, *places, table, -group, height, cols, largest, most, kind, asym, packed, fake,
                block, num_warps=8 if block > 64 else 4,
            )  # fmt: skip
            return
        given = _whole(x, places, table, kind, asym, largest) if group == -1 else None
        size = group if group > 0 else cols
        across = triton.cdiv(cols, size)
        block = min(max(16, triton.next_power_of_2(size)), _MOST)
        owned = max(1, _LEAST // block)
        _quantize_kernel[(triton.cdiv(rows * across, owned),)](
            x, *places, given, table, rows * across, size, cols, across, largest, most, kind, asym,
            packed, fake, block >= size and given is None, owned, block,
            num_warps=8 if block >= 2048 else 4,
        )  # fmt: skip


def _whole(x, places, table, kind, asym, largest):
    """Scale and zero point of everything: float32 [2]; those that are stored are written."""
    ends = torch.stack([*torch.aminmax(x)]).view(1, 2).float()
    spare = torch.empty(2, dtype=torch.uint8, device=x.device)
    packed = kind in _PACKED
    _quantize_kernel[(1,)](
        ends, spare, *places[1:], None, table, 1, 2, 2, 1, largest, 1.0, kind, asym, packed, False,
        True, 1, 16, num_warps=1,
    )  # fmt: skip
    stored = [
        p if p.dtype != torch.int16 else p.view(torch.bfloat16) for p in places[1:] if p is not None
    ]
    return torch.cat([p.float() for p in (*stored, stored[0])])[:2]


def most_of(x):
    """The largest number of its dtype."""
    return torch.finfo(x.dtype).max


def dequantize(codes, scales, zeros, out, kind, group, values):
    """Values of contiguous codes into out [.., K]; zeros: None where there are none."""
    cols = out.shape[-1]
    if not out.numel():
        return
    rows = out.numel() // cols
    size = abs(group) if group not in (0, -1) else cols
    mode = 0 if group == -1 else 1 if group >= 0 else 2
    block = min(max(16, triton.next_power_of_2(cols)), 1024)
    with on(out.device):
        _dequantize_kernel[(rows, triton.cdiv(cols, block))](
            _plain(codes), scales, zeros, table_of(values, out.device), out, cols, size,
            out.shape[-2] if out.dim() > 1 else 1, torch.finfo(out.dtype).max, kind,
            kind in _PACKED, mode, block, num_warps=4,
        )  # fmt: skip
