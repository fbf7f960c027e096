"""Attention backward: dK and dV by blocks of keys, then dQ by blocks of queries, each from scores
that are computed again (Dao 2023). No atomics, unless a config asks for dQ from the first pass.

With P = exp(score - lse) and delta = rowsum(dO O) - dlse: dV = P^T dO, dS = P (dO V^T - delta),
dQ = scale dS K, dK = scale dS^T Q.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.attention import padded
from fastllm.kernels.attention_scores import (
    adjusted,
    bounds,
    kept,
    read,
    seen,
    softcap_slope,
    span,
)
from fastllm.kernels.device import on
from fastllm.kernels.tiles import precision


@triton.jit
def _delta_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    safe_ptr,
    rows,
    H,
    T,
    DV,
    stride_db,
    stride_dh,
    stride_dt,
    stride_gb,
    stride_gh,
    stride_gt,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Program p owns BLOCK rows of out: delta, and lse as the other kernels read it (inf: P is 0).
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PACKED:  # out is [tokens, H, DV], else [B, H, T, DV]
        b, h, t = tl.zeros_like(row), row % H, row // H
    else:
        b, h, t = row // T // H, row // T % H, row % T
    d = tl.arange(0, BLOCK_DV)
    inside = (row < rows)[:, None] & (d < DV)[None, :]
    o = tl.load(out_ptr + row[:, None] * DV + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = b * stride_db + h * stride_dh + t * stride_dt
    do = tl.load(do_ptr + at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=float("-inf"))
    blind = lse == float("-inf")
    if dlse_ptr is not None:
        at = b * stride_gb + h * stride_gh + t * stride_gt
        delta -= tl.load(dlse_ptr + at, mask=(row < rows) & (lse != float("-inf")), other=0.0)
    tl.store(delta_ptr + row, tl.where(blind, 0.0, delta), mask=row < rows)
    tl.store(safe_ptr + row, tl.where(blind, float("inf"), lse), mask=row < rows)


@triton.jit
def _dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    lse_ptr,
    delta_ptr,
    weight_ptr,
    dk_ptr,
    dv_ptr,
    dq_ptr,
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
    stride_db,
    stride_dh,
    stride_dt,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_gkb,
    stride_gkh,
    stride_gks,
    stride_gvb,
    stride_gvh,
    stride_gvs,
    stride_gqb,
    stride_gqh,
    stride_gqt,
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
):
    # Program p owns BLOCK_N keys of one key head of one sequence; it works through the queries that
    # see them, of every head that reads this one. Blocks are transposed: [keys, queries].
    place = tl.program_id(0)
    head = place // tiles
    start = place % tiles * BLOCK_N
    groups = H // REPEAT
    b, g = (head // groups).to(tl.int64), (head % groups).to(tl.int64)
    q_row, T = bounds(cu_q_ptr, b, T, tl.num_programs(0) // tiles // groups)
    k_row, S = bounds(cu_k_ptr, b, S, tl.num_programs(0) // tiles // groups)
    if start >= S:
        return
    if BOTTOM:
        diagonal = S - T
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    factor = tl.cast(factor, tl.float32)
    col = start + tl.arange(0, BLOCK_N)
    k = read(
        k_ptr + b * stride_kb + g * stride_kh + k_row * stride_ks, col, stride_ks, S, D, BLOCK_D,
        True,
    )  # fmt: skip
    v = read(
        v_ptr + b * stride_vb + g * stride_vh + k_row * stride_vs, col, stride_vs, S, DV, BLOCK_DV,
        True,
    )  # fmt: skip
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    begin, end = 0, T
    if HAS_RIGHT:
        begin = tl.maximum(0, start - diagonal - right) // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        last = tl.minimum(start + BLOCK_N, S) - 1
        end = tl.maximum(0, tl.minimum(T, last - diagonal + left + 1))
    for r in range(0, REPEAT):
        h = g * REPEAT + r
        q_head = q_ptr + b * stride_qb + h * stride_qh + q_row * stride_qt
        do_head = do_ptr + b * stride_db + h * stride_dh + q_row * stride_dt
        stats = b * stride_lb + h * stride_lh + q_row * stride_lt
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head = mask_ptr + b * stride_mb + h * stride_mh
        slope = 0.0
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + b * stride_slopes + h).to(tl.float32)
        for first in range(begin, end, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            q = read(q_head, row, stride_qt, T, D, BLOCK_D, True)  # [BLOCK_M, BLOCK_D]
            at = stats + row.to(tl.int64) * stride_lt
            lse = tl.load(lse_ptr + at, mask=row < T, other=float("inf"))
            if weight_ptr is not None:  # the same sums, bit for bit, as the weights are made of
                s = tl.dot(q, k.T, input_precision=PRECISION).T * scale
            else:
                s = tl.dot(k, q.T, input_precision=PRECISION) * scale  # [BLOCK_N, BLOCK_M]
            if SOFTCAP:
                bend = softcap_slope(s, softcap)
            s = adjusted(
                s, mask_head, row[None, :], col[:, None], T, S, stride_mt, stride_ms, softcap,
                slope, diagonal, SOFTCAP, slopes_ptr is not None,
            )  # fmt: skip
            inside = seen(row[None, :], col[:, None], S, left, right, diagonal, HAS_LEFT, HAS_RIGHT)
            s = tl.where(inside, s, float("-inf"))
            p = tl.exp(s - lse[None, :])
            if weight_ptr is not None:
                p *= tl.load(weight_ptr + at, mask=row < T, other=0.0)[None, :]
            do = read(do_head, row, stride_dt, T, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
            dp = tl.dot(v, do.T, input_precision=PRECISION)
            dropped = p
            if DROPOUT:
                keep = kept(seed, (b * H + h), row[None, :], col[:, None], threshold)
                dropped = tl.where(keep, p * factor, 0.0)
                dp = tl.where(keep, dp * factor, 0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            delta = tl.load(delta_ptr + at, mask=row < T, other=0.0)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds *= bend
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if dq_ptr is not None:
                part = tl.dot(ds.T, k, input_precision=PRECISION) * scale
                d = tl.arange(0, BLOCK_D)
                into = dq_ptr + b * stride_gqb + h * stride_gqh
                into += (q_row + row)[:, None] * stride_gqt + d[None, :]
                tl.atomic_add(into, part, mask=(row < T)[:, None] & (d < D)[None, :], sem="relaxed")
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    dk_ptr += b * stride_gkb + g * stride_gkh
    dv_ptr += b * stride_gvb + g * stride_gvh
    own = (k_row + col)[:, None]
    tl.store(
        dk_ptr + own * stride_gks + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=(col < S)[:, None] & (d < D)[None, :],
    )  # fmt: skip
    tl.store(
        dv_ptr + own * stride_gvs + e[None, :], dv.to(dv_ptr.dtype.element_ty),
        mask=(col < S)[:, None] & (e < DV)[None, :],
    )  # fmt: skip


@triton.jit
def _dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    lse_ptr,
    delta_ptr,
    weight_ptr,
    dq_ptr,
    dmask_ptr,
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
    stride_db,
    stride_dh,
    stride_dt,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_gqb,
    stride_gqh,
    stride_gqt,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_ms,
    stride_gmb,
    stride_gmh,
    stride_gmt,
    stride_gms,
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
    ATOMIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Program p owns BLOCK_M queries of one head of one sequence, and their part of the mask's
    # gradient: stored where the mask is of full size, added where it broadcasts (ATOMIC).
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
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    factor = tl.cast(factor, tl.float32)
    g = h // REPEAT
    row = first + tl.arange(0, BLOCK_M)
    q = read(
        q_ptr + b * stride_qb + h * stride_qh + q_row * stride_qt, row, stride_qt, T, D, BLOCK_D,
        True,
    )  # fmt: skip
    do = read(
        do_ptr + b * stride_db + h * stride_dh + q_row * stride_dt, row, stride_dt, T, DV, BLOCK_DV,
        True,
    )  # fmt: skip
    k_ptr += b * stride_kb + g * stride_kh + k_row * stride_ks
    v_ptr += b * stride_vb + g * stride_vh + k_row * stride_vs
    at = b * stride_lb + h * stride_lh + (q_row + row) * stride_lt
    lse = tl.load(lse_ptr + at, mask=row < T, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=row < T, other=0.0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=row < T, other=0.0)
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_slopes + h).to(tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, _, _, end = span(
        first, tl.minimum(first + BLOCK_M, T) - 1, S, diagonal, left, right, HAS_LEFT, HAS_RIGHT,
        BLOCK_N,
    )  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = read(k_ptr, col, stride_ks, S, D, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if SOFTCAP:
            bend = softcap_slope(s, softcap)
        s = adjusted(
            s, mask_ptr, row[:, None], col[None, :], T, S, stride_mt, stride_ms, softcap, slope,
            diagonal, SOFTCAP, slopes_ptr is not None,
        )  # fmt: skip
        inside = seen(row[:, None], col[None, :], S, left, right, diagonal, HAS_LEFT, HAS_RIGHT)
        s = tl.where(inside, s, float("-inf"))
        p = tl.exp(s - lse[:, None])
        if weight_ptr is not None:
            p *= weight[:, None]
        v = read(v_ptr, col, stride_vs, S, DV, BLOCK_DV, True)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, (b * H + h), row[:, None], col[None, :], threshold)
            dp = tl.where(keep, dp * factor, 0.0)
        ds = p * (dp - delta[:, None])
        if dmask_ptr is not None:
            into = dmask_ptr + b * stride_gmb + h * stride_gmh
            into += row.to(tl.int64)[:, None] * stride_gmt + col.to(tl.int64)[None, :] * stride_gms
            there = (row < T)[:, None] & inside
            if ATOMIC:
                tl.atomic_add(into, ds, mask=there, sem="relaxed")
            else:
                tl.store(into, ds, mask=there)
        if SOFTCAP:
            ds *= bend
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if dq_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        into = dq_ptr + b * stride_gqb + h * stride_gqh
        into += (q_row + row)[:, None] * stride_gqt + d[None, :]
        tl.store(
            into, (dq * scale).to(dq_ptr.dtype.element_ty),
            mask=(row < T)[:, None] & (d < D)[None, :],
        )  # fmt: skip


@triton.jit
def _sum_again_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    cu_q_ptr,
    cu_k_ptr,
    lse_ptr,
    delta_ptr,
    weight_ptr,
    sinks_ptr,
    dlse_ptr,
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
    stride_db,
    stride_dh,
    stride_dt,
    stride_lb,
    stride_lh,
    stride_lt,
    stride_gb,
    stride_gh,
    stride_gt,
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
):
    # Program p owns BLOCK_M queries of one head: the denominator and delta, summed again over the
    # keys. lse and out are rounded, which float32 would feel: lse by a part in 10^7 of its size.
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
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    factor = tl.cast(factor, tl.float32)
    g = h // REPEAT
    row = first + tl.arange(0, BLOCK_M)
    q = read(
        q_ptr + b * stride_qb + h * stride_qh + q_row * stride_qt, row, stride_qt, T, D, BLOCK_D,
        True,
    )  # fmt: skip
    do = read(
        do_ptr + b * stride_db + h * stride_dh + q_row * stride_dt, row, stride_dt, T, DV, BLOCK_DV,
        True,
    )  # fmt: skip
    k_ptr += b * stride_kb + g * stride_kh + k_row * stride_ks
    v_ptr += b * stride_vb + g * stride_vh + k_row * stride_vs
    at = b * stride_lb + h * stride_lh + (q_row + row) * stride_lt
    lse = tl.load(lse_ptr + at, mask=row < T, other=float("inf"))
    slope = 0.0
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_slopes + h).to(tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    if mask_ptr is not None:
        mask_ptr += b * stride_mb + h * stride_mh
    total = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        total += tl.exp(sink - lse)
    begin, _, _, end = span(
        first, tl.minimum(first + BLOCK_M, T) - 1, S, diagonal, left, right, HAS_LEFT, HAS_RIGHT,
        BLOCK_N,
    )  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        k = read(k_ptr, col, stride_ks, S, D, BLOCK_D, True)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        s = adjusted(
            s, mask_ptr, row[:, None], col[None, :], T, S, stride_mt, stride_ms, softcap, slope,
            diagonal, SOFTCAP, slopes_ptr is not None,
        )  # fmt: skip
        inside = seen(row[:, None], col[None, :], S, left, right, diagonal, HAS_LEFT, HAS_RIGHT)
        s = tl.where(inside, s, float("-inf"))
        p = tl.exp(s - lse[:, None])
        v = read(v_ptr, col, stride_vs, S, DV, BLOCK_DV, True)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, (b * H + h), row[:, None], col[None, :], threshold)
            dp = tl.where(keep, dp * factor, 0.0)
        total += tl.sum(p, 1)
        delta += tl.sum(p * dp, 1)
    blind = total == 0.0
    weight = tl.where(blind, 0.0, 1.0 / tl.where(blind, 1.0, total))
    delta *= weight
    if dlse_ptr is not None:
        there = b * stride_gb + h * stride_gh + (q_row + row) * stride_gt
        delta -= tl.load(dlse_ptr + there, mask=(row < T) & (weight != 0.0), other=0.0)
    tl.store(delta_ptr + at, delta, mask=row < T)
    tl.store(weight_ptr + at, weight, mask=row < T)


def attention_bwd(dout, dlse, shape, options, out, lse, needs, config):
    """(dq, dk, dv, dmask in fp32, dsinks), None where not needed.

    dout and dlse (or None) have the layouts of out and lse; out and lse are contiguous.
    """
    x = shape
    # grids of packed sequences have rows that no program owns
    new = torch.empty if x.cu_q is None else torch.zeros
    dq, dk, dv = (
        new(y.shape, dtype=y.dtype, device=y.device) if needed else None
        for y, needed in zip((x.q, x.k, x.v), needs, strict=False)
    )
    delta, safe = _delta(dout, dlse, x, out, lse)
    dmask = x.mask is not None and needs[3] and x.mask.dtype != torch.uint8
    grad_mask = _mask_gradient(x) if dmask else None
    weight = None
    with on(x.q.device):
        if lse.numel() and x.k.numel():
            common = (x.mask, x.slopes, x.seed, x.cu_q, x.cu_k, safe, delta)
            if x.q.dtype == torch.float32:
                weight = _sum_again(dout, dlse, x, options, common, config)
            common = (*common, weight)
            atomic = config["atomic"] and dq is not None
            if dk is not None or dv is not None or atomic:
                dq = _dkdv(dout, x, options, common, dq, dk, dv, config, atomic)
            if (dq is not None and not atomic) or grad_mask is not None:
                into = None if atomic else dq
                _dq(dout, x, options, common, into, grad_mask, config)
        else:
            for grad in (dq, dk, dv):
                if grad is not None:
                    grad.zero_()
    if grad_mask is not None:
        grad_mask = grad_mask.sum_to_size(x.mask.shape)
    dsinks = None
    if x.sinks is not None and needs[4]:
        heads = (1, -1, 1) if x.cu_q is None else (1, -1)
        share = torch.exp(x.sinks.double().view(heads) - safe)
        share = share if weight is None else share * weight
        dims = (0, 2) if x.cu_q is None else 0
        dsinks = -(share * delta).sum(dims).to(x.sinks.dtype)
    return dq, dk, dv, grad_mask, dsinks


def _mask_gradient(x):
    """Zeros in fp32 that the mask's gradient is written to, or, as the mask broadcasts, added to;
    of full size where results have to be deterministic."""
    full = (x.batch, x.heads, x.t, x.s)
    whole = torch.are_deterministic_algorithms_enabled()
    return torch.zeros(full if whole else x.mask.shape, dtype=torch.float32, device=x.q.device)


def _delta(dout, dlse, x, out, lse):
    """(delta, lse with inf where a row saw nothing), as lse."""
    delta, safe = torch.empty_like(lse), torch.empty_like(lse)
    rows, block_dv = lse.numel(), padded(x.dv)
    if rows:
        block = max(1, min(128, 4096 // block_dv))
        of_lse = (0, 0, 0) if dlse is None else x.strides(dlse)
        with on(out.device):
            _delta_kernel[(triton.cdiv(rows, block),)](
                out, dout, lse, dlse, delta, safe, rows, x.heads, x.t, x.dv, *x.strides(dout),
                *of_lse, x.cu_q is not None, block, block_dv, num_warps=4,
            )  # fmt: skip
    return delta, safe


def _numbers(options):
    return (
        options.scale, options.softcap, options.threshold, options.factor, options.left,
        options.right, options.diagonal, options.bottom, options.left >= 0, options.right >= 0,
        options.softcap > 0.0, options.dropout,
    )  # fmt: skip


def _dkdv(dout, x, options, common, dq, dk, dv, config, atomic):
    """Fills dk and dv; with `atomic`, returns dq, summed in fp32 in no fixed order."""
    dk = torch.empty_like(x.k, memory_format=torch.contiguous_format) if dk is None else dk
    dv = torch.empty_like(x.v, memory_format=torch.contiguous_format) if dv is None else dv
    total = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device) if atomic else None
    strides = (x.q, x.k, x.v, dout, common[5], dk, dv)
    tiles = triton.cdiv(x.s, config["block_n"])
    _dkdv_kernel[(tiles * x.batch * x.groups,)](
        x.q, x.k, x.v, dout, *common, dk, dv, total, x.t, x.s, x.heads, x.heads // x.groups, x.d,
        x.dv, tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if total is None else x.strides(total)), *x.mask_strides(x.mask),
        x.slopes_stride(), *_numbers(options), precision(x.q.dtype, x.tf32), config["block_m"],
        config["block_n"], padded(x.d), padded(x.dv), num_warps=config["warps"],
        num_stages=config["stages"],
    )  # fmt: skip
    return dq if total is None else total.to(dq.dtype)


def _dq(dout, x, options, common, dq, dmask, config):
    """Fills dq and the mask's gradient, where they are wanted."""
    block_m, block_n = config["block_n"], config["block_m"]
    tiles = triton.cdiv(x.t, block_m)
    strides = (x.q, x.k, x.v, dout, common[5])
    full = dmask is not None and tuple(dmask.shape) == (x.batch, x.heads, x.t, x.s)
    _dq_kernel[(tiles * x.batch * x.heads,)](
        x.q, x.k, x.v, dout, *common, dq, dmask, x.t, x.s, x.heads, x.heads // x.groups, x.d, x.dv,
        tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if dq is None else x.strides(dq)), *x.mask_strides(x.mask),
        *x.mask_strides(dmask), x.slopes_stride(), *_numbers(options), not full,
        precision(x.q.dtype, x.tf32), block_m, block_n, padded(x.d), padded(x.dv),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip


def _sum_again(dout, dlse, x, options, common, config):
    """What exp(score - lse) is to be multiplied by, as lse; overwrites delta."""
    weight = torch.zeros_like(common[5])
    block_m, block_n = config["block_n"], config["block_m"]
    tiles = triton.cdiv(x.t, block_m)
    strides = (x.q, x.k, x.v, dout, common[5])
    _sum_again_kernel[(tiles * x.batch * x.heads,)](
        x.q, x.k, x.v, dout, *common, weight, x.sinks, dlse, x.t, x.s, x.heads,
        x.heads // x.groups, x.d, x.dv, tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if dlse is None else x.strides(dlse)), *x.mask_strides(x.mask),
        x.slopes_stride(), *_numbers(options), precision(x.q.dtype, x.tf32), block_m, block_n,
        padded(x.d), padded(x.dv), num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    return weight
