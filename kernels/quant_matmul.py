"""y = x W^T + b with a weight of codes, decoded in registers: 8 and 4 bits, integers and floats.

A few tokens: K is split among programs, which store partial sums that a second kernel adds up in a
fixed order. Many: tiles. With int8 activations the products are of int8 with sums of int32.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import MAX_WARPS, multiprocessors, on
from fastllm.kernels.tiles import activate, tile_at

INT8, INT4, NF4, FP4, E4M3, E5M2, MXFP8 = range(7)


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How a product is cut: blocks of tokens, rows of the weight and K; programs that share K."""

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    split_k: int = 1


@triton.jit
def _float8(code, FRACTION: tl.constexpr):
    """The number that a byte stands for as a float8 with FRACTION bits of fraction (3: e4m3fn)."""
    code = code.to(tl.int32)
    sign, rest = (code & 0x80) << 24, code & 0x7F
    bias: tl.constexpr = 7 if FRACTION == 3 else 15
    least: tl.constexpr = 0.001953125 if FRACTION == 3 else 0.0000152587890625
    normal = (rest << (23 - FRACTION)) + ((127 - bias) << 23)
    small = (rest.to(tl.float32) * least).to(tl.int32, bitcast=True)
    bits = tl.where(rest < (1 << FRACTION), small, normal)
    if FRACTION == 3:
        bits = tl.where(rest == 0x7F, 0x7FC00000, bits)
    else:
        bits = tl.where(rest >= 0x7C, normal | 0x7F800000, bits)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def _scale(value):
    """A scale as float32: a byte is the exponent of a power of two."""
    if value.dtype == tl.uint8:
        byte = value.to(tl.int32)
        bits = tl.where(byte == 0, 0x400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
        return bits.to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def _codes(codes_ptr, col, inner, N, K, row_bytes, KIND: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes [BLOCK_N, BLOCK_K] of K positions from `inner` on, as integers; 0 past the edges."""
    if KIND == 1 or KIND == 2 or KIND == 3:
        at = inner // 2 + tl.arange(0, BLOCK_K // 2)
        mask = (col < N)[:, None] & (at < (K + 1) // 2)[None, :]
        pair = tl.load(codes_ptr + col[:, None] * row_bytes + at[None, :], mask=mask, other=0)
        return tl.interleave(pair & 15, pair >> 4)
    else:
        at = inner + tl.arange(0, BLOCK_K)
        mask = (col < N)[:, None] & (at < K)[None, :]
        return tl.load(codes_ptr + col[:, None] * row_bytes + at[None, :], mask=mask, other=0)


@triton.jit
def _numbers(codes, table_ptr, zero, KIND: tl.constexpr):
    """What codes stand for in units of their scale, float32."""
    if KIND == 0:
        return codes.to(tl.float32)
    elif KIND == 1:
        return codes.to(tl.float32) - zero
    elif KIND == 2 or KIND == 3:
        return tl.load(table_ptr + codes.to(tl.int32))
    elif KIND == 5:
        return _float8(codes, 2)
    else:
        return _float8(codes, 3)


@triton.jit(do_not_specialize=["M"])
def _quant_matmul_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    table_ptr,
    bias_ptr,
    token_scales_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    row_bytes,
    scale_row,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    INTEGER: tl.constexpr,
    PARTIAL: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    # Program (t, s) owns tile t of y and slice s of K
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    slice_k = tl.program_id(1)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale_at = scales_ptr + (col // SCALE_BLOCK) * scale_row
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER and GROUP == 0 else tl.float32)
    for step in range(slice_k * steps, min((slice_k + 1) * steps, tl.cdiv(K, BLOCK_K))):
        inner = step * BLOCK_K
        at = inner + tl.arange(0, BLOCK_K)
        inside = (row < M)[:, None] & (at < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xm + at[None, :], mask=inside, other=0)
        codes = _codes(codes_ptr, col, inner, N, K, row_bytes, KIND, BLOCK_K)
        scale = tl.full([BLOCK_N], 1.0, tl.float32)
        zero = tl.full([BLOCK_N], 8.0, tl.float32)
        if GROUP > 0:
            scale = _scale(tl.load(scale_at + inner // GROUP, mask=col < N, other=0))
        if zeros_ptr is not None:
            place = (col // SCALE_BLOCK) * scale_row + (inner // GROUP if GROUP > 0 else 0)
            zero = tl.load(zeros_ptr + place, mask=col < N, other=0).to(tl.float32)
        if INTEGER:
            whole = (codes.to(tl.int8) - 8).to(tl.int8) if KIND == 1 else codes
            part = tl.dot(x, whole.T, out_dtype=tl.int32)
            if GROUP > 0:
                value = part.to(tl.float32)
                if zeros_ptr is not None:
                    total = tl.sum(x.to(tl.int32), axis=1).to(tl.float32)
                    value += total[:, None] * (8.0 - zero)[None, :]
                acc += value * scale[None, :]
            else:
                acc += part
        else:
            w = _numbers(codes, table_ptr, zero[:, None], KIND)
            if GROUP > 0:
                w = w * scale[:, None]
            acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision=PRECISION)
    keep = (row < M)[:, None] & (col < N)[None, :]
    out = row[:, None] * N + col[None, :]
    value = acc.to(tl.float32)
    if GROUP == 0:
        value = value * _scale(tl.load(scale_at, mask=col < N, other=0))[None, :]
    if PARTIAL:
        tl.store(y_ptr + slice_k.to(tl.int64) * M * N + out, value, mask=keep)
    else:
        if token_scales_ptr is not None:
            value = value * tl.load(token_scales_ptr + row, mask=row < M, other=0)[:, None]
        if bias_ptr is not None:
            value += tl.load(bias_ptr + col, mask=col < N, other=0).to(tl.float32)[None, :]
        value = activate(value, ACTIVATION)
        tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["M"])
def _add_slices_kernel(
    partial_ptr,
    bias_ptr,
    token_scales_ptr,
    y_ptr,
    M,
    N,
    SPLIT_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    # Program (m, t) owns block t of token m
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = col < N
    value = tl.zeros([BLOCK_N], tl.float32)
    for part in range(SPLIT_K):
        value += tl.load(partial_ptr + (part * M + row) * N + col, mask=mask, other=0.0)
    if token_scales_ptr is not None:
        value = value * tl.load(token_scales_ptr + row)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + col, mask=mask, other=0).to(tl.float32)
    value = activate(value, ACTIVATION)
    tl.store(y_ptr + row * N + col, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _nearest(x):
    """Half to even, for |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, given_ptr, codes_ptr, scales_ptr, K, stride_xm, BLOCK_K: tl.constexpr
):
    # Program m owns token m: two passes over its values
    row = tl.program_id(0).to(tl.int64)
    top = tl.zeros([BLOCK_K], tl.float32)
    odd = tl.zeros([BLOCK_K], tl.int32)
    for at in range(0, K, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        x = tl.abs(tl.load(x_ptr + row * stride_xm + i, mask=i < K, other=0.0).to(tl.float32))
        odd = odd | (x.to(tl.int32, bitcast=True) >= 0x7F800000).to(tl.int32)
        top = tl.maximum(top, x)
    finite = tl.max(odd, axis=0) == 0
    if given_ptr is not None:
        scale = tl.load(given_ptr).to(tl.float32)
    else:
        scale = tl.div_rn(tl.max(top, axis=0), 127.0)
    safe = tl.where((scale > 0) & finite, scale, 1.0)
    for at in range(0, K, BLOCK_K):
        i = at + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + i, mask=i < K, other=0.0).to(tl.float32)
        x = tl.where(finite & (scale > 0), x, 0.0)
        code = tl.minimum(tl.maximum(tl.div_rn(x, safe + tl.zeros_like(x)), -127.0), 127.0)
        tl.store(codes_ptr + row * K + i, _nearest(code).to(tl.int8), mask=i < K)
    tl.store(scales_ptr + row, tl.where(finite, scale, float("nan")))


# ---- launchers


def quantize_tokens(x, given=None):
    """(int8 [M, K], float32 [M]) of x [M, K]: a scale a token, max |x| / 127 unless given."""
    rows, k = x.shape
    codes = torch.empty((rows, k), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = min(4096, max(16, triton.next_power_of_2(k)))
        with on(x.device):
            _quantize_tokens_kernel[(rows,)](x, given, codes, scales, k, x.stride(0), block)
    return codes, scales


def divisor(group, most):
    """The largest power of two that divides `group`, up to `most`."""
    return most if group <= 0 else min(most, group & -group)


def heuristic(m, n, k, group, integer, sms):
    """The config to take untried."""
    deep = divisor(group, 128)
    if m <= 16:
        base = QuantConfig(16, 64, deep, 4, 4)
    elif m <= 64:
        base = QuantConfig(64, 64, min(deep, 64), 4, 4)
    elif m < 512:
        base = QuantConfig(64, 128, min(deep, 64), 4, 3)
    else:
        base = QuantConfig(128, 128, min(deep, 64), 8, 3)
    if integer and group > 0 and m > 64:  # sums of both kinds are held: smaller blocks
        base = QuantConfig(64, 64, min(deep, 64), 4, 3)
    tiles = triton.cdiv(m, base.block_m) * triton.cdiv(n, base.block_n)
    steps, split = triton.cdiv(k, base.block_k), 1
    while split < 16 and tiles * split < 2 * sms and steps >= 8 * split:
        split *= 2
    return dataclasses.replace(base, split_k=split)


def configs(m, group):
    """Every config worth trying for m tokens and a group of this size; the tuner times them."""
    deep = divisor(group, 128)
    height = 16 if m <= 16 else 64 if m <= 128 else 128
    splits = (1, 2, 4, 8, 16) if m <= 64 else (1,)
    return [
        QuantConfig(height, wide, size, warps, stages, split)
        for wide in (32, 64, 128)
        for size in sorted({min(deep, 32), min(deep, 64), deep})
        for warps, stages in ((4, 3), (4, 4), (8, 3))
        for split in splits
        if height * wide // (32 * warps) <= 128
    ]


def quant_matmul(
    x,
    codes,
    scales,
    zeros,
    bias,
    kind,
    group,
    k,
    *,
    table=None,
    token_scales=None,
    dtype=None,
    activation=None,
    config=None,
):
    """act(x W^T + b) [M, N] for x [M, K] of floats, or of int8 with token_scales [M].

    codes [N, K] bytes, or [N, ceil(K / 2)] with two a byte; scales as fastllm.ops.quant.layout has
    them, group a multiple of 32 or 0, -1, -b; table [16] float32: what nf4 and fp4 codes stand for;
    dtype: of the result where x is int8; activation: a name of tiles.ACTIVATIONS.
    """
    m, n = x.shape[0], codes.shape[0]
    integer = token_scales is not None
    y = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    shared, block = (-group if group < -1 else max(group, 0)), (-group if group < -1 else 1)
    stretch = shared
    if integer and (kind == INT4 or k > 131072) and not shared:
        stretch = -(-k // 128) * 128  # one group: sums leave int32 step by step
    config = config or heuristic(m, n, k, shared, integer, multiprocessors(x.device))
    split = config.split_k
    out = y if split == 1 else torch.empty((split, m, n), dtype=torch.float32, device=x.device)
    scale_row = scales.shape[-1] if scales.dim() == 2 else 0
    if codes.dtype not in (torch.int8, torch.uint8):
        codes = codes.view(torch.uint8)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    last = split == 1
    with on(x.device):
        _quant_matmul_kernel[(tiles, split)](
            x, codes, scales, zeros, table, bias if last else None, token_scales if last else None,
            out, m, n, k, x.stride(0), codes.stride(0), scale_row,
            KIND=kind, GROUP=stretch, SCALE_BLOCK=block, INTEGER=integer, PARTIAL=not last,
            SPLIT_K=split, BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            PRECISION="ieee", ACTIVATION=activation if last else None,
            num_warps=min(config.warps, MAX_WARPS), num_stages=config.stages,
        )  # fmt: skip
        if not last:
            width = 1024
            _add_slices_kernel[(m, triton.cdiv(n, width))](
                out, bias, token_scales, y, m, n, SPLIT_K=split, BLOCK_N=width,
                ACTIVATION=activation,
            )  # fmt: skip
    return y
