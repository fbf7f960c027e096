"""Attention forward: softmax(scores) V in one pass over the keys (Dao 2023), nothing of size T x S.

Blocks of keys that a window hides are never visited, and only blocks on its edge are masked. What
the scores are is in fastllm/ops/attention/spec.py; the kernels keep them in natural units.
"""

import triton
import triton.language as tl
from fastllm.kernels.attention_scores import (
    adjusted,
    bounds,
    kept,
    read,
    seen,
    span,
)
from fastllm.kernels.device import on
from fastllm.kernels.tiles import precision, workspace


@triton.jit
def _walk(
    acc,
    total,
    m,
    q,
    k,
    v,
    mask_ptr,
    seed,
    head,
    row,
    begin,
    end,
    T,
    S,
    D,
    DV,
    stride_ks,
    stride_vs,
    stride_mt,
    stride_ms,
    scale,
    softcap,
    slope,
    threshold,
    left,
    right,
    diagonal,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """The running (sum, denominator, maximum) of rows `row` after the keys from begin to end."""
    lane = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, warp_specialize=SPECIALIZE):
        col = start + lane
        if TMA:
            key = k.load([tl.cast(start, tl.int32), 0])
        else:
            key = read(k, col, stride_ks, S, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, key.T, input_precision=PRECISION) * scale
        s = adjusted(
            s, mask_ptr, row[:, None], col[None, :], T, S, stride_mt, stride_ms, softcap, slope,
            diagonal, SOFTCAP, ALIBI,
        )  # fmt: skip
        if MASKED:
            inside = seen(row[:, None], col[None, :], S, left, right, diagonal, HAS_LEFT, HAS_RIGHT)
            s = tl.where(inside, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        # -inf - -inf is NaN: a row that has seen nothing yet is measured from 0
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(s - base[:, None])
        shrink = tl.exp(m - base)
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            p = tl.where(kept(seed, head, row[:, None], col[None, :], threshold), p, 0.0)
        if TMA:
            value = v.load([tl.cast(start, tl.int32), 0])
        else:
            value = read(v, col, stride_vs, S, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
        acc *= shrink[:, None]
        acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        m = top
    return acc, total, m


@triton.jit
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    slopes_ptr,
    sinks_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    out_ptr,
    lse_ptr,
    T,
    S,
    H,
    REPEAT,
    D,
    DV,
    tiles,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_slopes,
    scale,
    softcap,
    threshold,
    factor,
    left,
    right,
    diagonal,
    BOTTOM: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TMA: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    # Program p owns BLOCK_M queries of one head of one sequence; late queries come first, since
    # they see most where the mask is causal.
    place = tl.program_id(0)
    head = place // tiles
    first = (tiles - 1 - place % tiles) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_row, T = bounds(cu_q_ptr, b, T, tl.num_programs(0) // tiles // H)
    k_row, S = bounds(cu_k_ptr, b, S, tl.num_programs(0) // tiles // H)
    if first >= T:
        return
    if BOTTOM:
        diagonal = S - T
    g = h // REPEAT
    q_ptr += b * stride_qb + h * stride_qh + q_row * stride_qt
    k_ptr += b * stride_kb + g * stride_kh + k_row * stride_ks
    v_ptr += b * stride_vb + g * stride_vh + k_row * stride_vs
    row = first + tl.arange(0, BLOCK_M)
    q = read(q_ptr, row, stride_qt, T, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_slopes + h).to(tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    if TMA:
        k = tl.make_tensor_descriptor(k_ptr, [S, D], [stride_ks, 1], [BLOCK_N, BLOCK_D])
        v = tl.make_tensor_descriptor(v_ptr, [S, DV], [stride_vs, 1], [BLOCK_N, BLOCK_DV])
    else:
        k, v = k_ptr, v_ptr
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks_ptr is not None:  # a logit that is there before any key
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        m = tl.where(sink == float("-inf"), float("-inf"), sink + tl.zeros_like(total))
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    begin, whole, rest, end = span(
        first, tl.minimum(first + BLOCK_M, T) - 1, S, diagonal, left, right, HAS_LEFT, HAS_RIGHT,
        BLOCK_N,
    )  # fmt: skip
    if HAS_LEFT:
        acc, total, m = _walk(
            acc, total, m, q, k, v, mask_ptr, seed, head, row, begin, whole, T, S, D, DV, stride_ks,
            stride_vs, stride_mt, stride_ms, scale, softcap, slope, threshold, left, right,
            diagonal, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes_ptr is not None, DROPOUT,
            PRECISION, BLOCK_N, BLOCK_D, BLOCK_DV, TMA, False,
        )  # fmt: skip
    acc, total, m = _walk(
        acc, total, m, q, k, v, mask_ptr, seed, head, row, whole, rest, T, S, D, DV, stride_ks,
        stride_vs, stride_mt, stride_ms, scale, softcap, slope, threshold, left, right, diagonal,
        False, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes_ptr is not None, DROPOUT, PRECISION, BLOCK_N,
        BLOCK_D, BLOCK_DV, TMA, SPECIALIZE,
    )  # fmt: skip
    acc, total, m = _walk(
        acc, total, m, q, k, v, mask_ptr, seed, head, row, rest, end, T, S, D, DV, stride_ks,
        stride_vs, stride_mt, stride_ms, scale, softcap, slope, threshold, left, right, diagonal,
        True, HAS_LEFT, HAS_RIGHT, SOFTCAP, slopes_ptr is not None, DROPOUT, PRECISION, BLOCK_N,
        BLOCK_D, BLOCK_DV, TMA, False,
    )  # fmt: skip
    blind = total == 0.0
    share = tl.where(blind, 0.0, factor / tl.where(blind, 1.0, total))
    lse = tl.where(blind, float("-inf"), m + tl.log(tl.where(blind, 1.0, total)))
    d = tl.arange(0, BLOCK_DV)
    at = (q_row + row)[:, None] * stride_ot + d[None, :]
    out_ptr += b * stride_ob + h * stride_oh
    inside = (row < T)[:, None] & (d < DV)[None, :]
    tl.store(out_ptr + at, (acc * share[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    lse_ptr += b * stride_lb + h * stride_lh
    tl.store(lse_ptr + (q_row + row) * stride_lt, lse, mask=row < T)


def attention_fwd(shape, options, config):
    """(out, lse) of a `Shape` of inputs (attention_scores.py)."""
    x = shape
    out, lse = x.results()
    if not out.numel():
        return out, lse
    block_d, block_dv = padded(x.d), padded(x.dv)
    tiles = triton.cdiv(x.t, config["block_m"])
    tma = config["tma"] and x.describable()
    with on(x.q.device):
        if tma:
            triton.set_allocator(workspace)
        _attention_fwd_kernel[(tiles * x.batch * x.heads,)](
            x.q, x.k, x.v, x.mask, x.slopes, x.sinks, x.seed, x.cu_q, x.cu_k, out, lse, x.t, x.s,
            x.heads, x.heads // x.groups, x.d, x.dv, tiles, *x.strides(x.q), *x.strides(x.k),
            *x.strides(x.v), *x.strides(out), *x.strides(lse), *x.mask_strides(x.mask),
            x.slopes_stride(), options.scale, options.softcap, options.threshold, options.factor,
            options.left, options.right, options.diagonal, options.bottom, options.left >= 0,
            options.right >= 0, options.softcap > 0.0, options.dropout,
            precision(x.q.dtype, x.tf32),
            config["block_m"], config["block_n"], block_d, block_dv, tma,
            tma and config["specialize"], num_warps=config["warps"], num_stages=config["stages"],
        )  # fmt: skip
    return out, lse


def padded(width):
    """The block that holds a head's width."""
    return max(16, triton.next_power_of_2(width))
