"""Attention to a cache, contiguous or in pages: the keys of a sequence are split among programs,
whose parts are merged in order (Flash-Decoding, Dao et al. 2023).

All query heads that read a key head are rows of one block, so that keys are read once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastllm.kernels.attention import padded
from fastllm.kernels.attention_scores import adjusted
from fastllm.kernels.device import multiprocessors, on
from fastllm.kernels.tiles import precision


class Coded(NamedTuple):
    """What codes [.., G, S, width] come with: scales and zeros [.., G, S, groups], contiguous.

    kind: 0, bytes; 1, two codes of 0 to 15 a byte, the even one in the low half; 8 is the zero
    where there are no zeros. `group` numbers share a scale.
    """

    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    kind: int = -1
    group: int = 1
    width: int = 0


@triton.jit
def _numbers(
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    at,
    scale_at,
    col,
    mask,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
):
    # [BLOCK_N, BLOCK_D] numbers in fp32, of rows at `at`, whose scales are at `scale_at`
    if KIND == 0:
        code = tl.load(codes_ptr + at[:, None] + col[None, :], mask=mask, other=0)
        value = code.to(tl.float32)
    else:
        byte = tl.load(codes_ptr + at[:, None] + (col // 2)[None, :], mask=mask, other=0)
        value = ((byte.to(tl.int32) >> (col % 2 * 4)[None, :]) & 15).to(tl.float32)
    place = scale_at[:, None] + (col // GROUP)[None, :]
    if zeros_ptr is not None:
        value -= tl.load(zeros_ptr + place, mask=mask, other=0.0).to(tl.float32)
    elif KIND == 1:
        value -= 8.0
    return value * tl.load(scales_ptr + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scales_ptr,
    k_zeros_ptr,
    v_scales_ptr,
    v_zeros_ptr,
    used_ptr,
    table_ptr,
    slopes_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    T,
    H,
    REPEAT,
    D,
    DV,
    ROOM,
    PAGE,
    tiles,
    share,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_kbs,
    stride_khs,
    stride_kss,
    stride_vbs,
    stride_vhs,
    stride_vss,
    stride_pb,
    stride_slopes,
    scale,
    softcap,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
    K_KIND: tl.constexpr,
    K_GROUP: tl.constexpr,
    V_KIND: tl.constexpr,
    V_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Program (m, s) owns BLOCK_M of the REPEAT * T rows of one key head of one sequence, and the
    # s-th part of its keys, `share` of them. Out is [SPLITS, B, H, T, DV], lse alike. Keys and
    # values are numbers, or codes of a K_KIND and V_KIND that is not negative.
    place, split = tl.program_id(0), tl.program_id(1)
    head = place // tiles
    groups = H // REPEAT
    b, g = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    lane = place % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    there = lane < REPEAT * T
    h, t = g * REPEAT + lane // T, lane % T
    used = tl.minimum(tl.maximum(tl.load(used_ptr + b), 0), ROOM)
    diagonal = used - T
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at = b * stride_qb + h * stride_qh + t * stride_qt
    q = tl.load(q_ptr + at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    slope = tl.zeros([BLOCK_M, 1], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_slopes + h, mask=there, other=0.0)
        slope = slope.to(tl.float32)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:  # noqa: SIM102 (None is settled when it compiles)
        if split == 0:  # in one part only
            sink = tl.load(sinks_ptr + h, mask=there, other=float("-inf")).to(tl.float32)
            total = tl.where(sink == float("-inf"), 0.0, 1.0)
            m = sink
    begin = split * share
    end = tl.minimum(begin + share, used)
    if HAS_LEFT:  # blocks before every row's window
        begin = tl.maximum(begin, (tl.maximum(0, diagonal - left) // BLOCK_N) * BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        inside = col < end
        if table_ptr is None:
            page, slot = b + tl.zeros_like(col), col.to(tl.int64)
        else:
            page = tl.load(table_ptr + b * stride_pb + col // PAGE, mask=inside, other=0)
            page, slot = page.to(tl.int64), (col % PAGE).to(tl.int64)
        k_at = page * stride_kb + g * stride_kh + slot * stride_ks
        v_at = page * stride_vb + g * stride_vh + slot * stride_vs
        mask = inside[:, None] & (d < D)[None, :]
        if K_KIND < 0:
            k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=mask, other=0.0)
        else:
            scale_at = page * stride_kbs + g * stride_khs + slot * stride_kss
            k = _numbers(
                k_ptr, k_scales_ptr, k_zeros_ptr, k_at, scale_at, d, mask, K_KIND, K_GROUP
            ).to(q.dtype)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        s = adjusted(
            s, None, t[:, None], col[None, :], T, used, 0, 0, softcap, slope, diagonal, SOFTCAP,
            slopes_ptr is not None,
        )  # fmt: skip
        seen = inside[None, :] & there[:, None]
        if HAS_LEFT:
            seen = seen & (col[None, :] - t[:, None] - diagonal >= -left)
        if HAS_RIGHT:
            seen = seen & (col[None, :] - t[:, None] - diagonal <= right)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(m - base)
        total = total * shrink + tl.sum(p, 1)
        mask = inside[:, None] & (e < DV)[None, :]
        if V_KIND < 0:
            v = tl.load(v_ptr + v_at[:, None] + e[None, :], mask=mask, other=0.0)
        else:
            scale_at = page * stride_vbs + g * stride_vhs + slot * stride_vss
            v = _numbers(
                v_ptr, v_scales_ptr, v_zeros_ptr, v_at, scale_at, e, mask, V_KIND, V_GROUP
            ).to(q.dtype)
        acc *= shrink[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = top
    blind = total == 0.0
    weight = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    lse = tl.where(blind, float("-inf"), m + tl.log(tl.where(blind, 1.0, total)))
    batch = tl.num_programs(0) // tiles // groups
    row = ((split.to(tl.int64) * batch + b) * H + h) * T + t
    tl.store(
        out_ptr + row[:, None] * DV + e[None, :],
        (acc * weight[:, None]).to(out_ptr.dtype.element_ty),
        mask=there[:, None] & (e < DV)[None, :],
    )
    tl.store(lse_ptr + row, lse, mask=there)


@triton.jit
def _merge_kernel(
    parts_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    rows,
    DV,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Program p owns BLOCK rows: out = sum(exp(lse_i - lse) out_i), parts in order.
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_DV)
    inside = row < rows
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    for part in range(SPLITS):
        top = tl.maximum(
            top, tl.load(lses_ptr + part * rows + row, mask=inside, other=float("-inf"))
        )
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, BLOCK_DV], tl.float32)
    for part in range(SPLITS):
        at = part * tl.cast(rows, tl.int64) + row
        weight = tl.exp(tl.load(lses_ptr + at, mask=inside, other=float("-inf")) - base)
        value = tl.load(
            parts_ptr + at[:, None] * DV + e[None, :],
            mask=inside[:, None] & (e < DV)[None, :],
            other=0.0,
        )
        acc += weight[:, None] * value
        total += weight
    blind = total == 0.0
    safe = tl.where(blind, 1.0, total)
    tl.store(
        out_ptr + row[:, None] * DV + e[None, :],
        (acc / safe[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (e < DV)[None, :],
    )
    lse = tl.where(blind, float("-inf"), base + tl.log(safe))
    tl.store(lse_ptr + row, lse, mask=inside)


def decode_splits(programs, room, block, processors):
    """How many programs share a sequence's keys: enough for two each multiprocessor, a power of 2,
    each with four blocks or more."""
    wanted = max(1, 2 * processors // max(1, programs))
    most = max(1, room // (4 * block))
    return 1 << (min(wanted, most, 64).bit_length() - 1)


def _strides(scales):
    return (0, 0, 0) if scales is None else scales.stride()[:3]


def attention_decode(
    q, k, v, used, table, slopes, sinks, scale, left, right, softcap, *, tf32=False, splits=None,
    coded=None,
):  # fmt: skip
    """(out, lse) of q [B, H, T, D] to caches [B, G, S, D] and [B, G, S, DV], or pages.

    used [B] int32 counts each sequence's keys; table [B, pages] int32 or None. splits: programs
    that share a sequence's keys; None: what fills the device. It decides how sums are rounded.
    coded: (Coded of keys, Coded of values) where the caches hold codes.
    """
    keys, values = coded or (Coded(), Coded(width=v.shape[3]))
    (b, h, t, d), g, dv = q.shape, k.shape[1], values.width
    out = torch.empty((b, h, t, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, t), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    rows, page = h // g * t, k.shape[2]
    room = page if table is None else page * table.shape[1]
    half = q.dtype != torch.float32
    block_m = min(64 if half else 32, max(16, triton.next_power_of_2(rows)))
    # codes take registers: their tiles are decoded in fp32
    block_n = 64 if half and max(d, dv) <= 128 and not coded else 32
    tiles = triton.cdiv(rows, block_m)
    if splits is None:
        splits = decode_splits(tiles * b * g, room, block_n, multiprocessors(q.device))
    share = triton.cdiv(triton.cdiv(room, splits), block_n) * block_n
    lead = (splits, b, h, t)
    parts = out if splits == 1 else torch.empty((*lead, dv), dtype=torch.float32, device=q.device)
    lses = lse if splits == 1 else torch.empty(lead, dtype=torch.float32, device=q.device)
    slope_stride = 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)
    with on(q.device):
        _decode_kernel[(tiles * b * g, splits)](
            q, k, v, keys.scales, keys.zeros, values.scales, values.zeros, used, table, slopes,
            sinks, parts, lses, t, h, h // g, d, dv, room, page, tiles, share,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(keys.scales),
            *_strides(values.scales),
            0 if table is None else table.stride(0), slope_stride, scale, softcap, left, right,
            left >= 0, right >= 0, softcap > 0.0, splits, precision(q.dtype, tf32), keys.kind,
            keys.group, values.kind, values.group, block_m, block_n, padded(d), padded(dv),
            num_warps=4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            count, block_dv = lse.numel(), padded(dv)
            block = max(1, 1024 // block_dv)
            _merge_kernel[(triton.cdiv(count, block),)](
                parts, lses, out, lse, count, dv, splits, block, block_dv, num_warps=4
            )
    return out, lse
