"""Attention backward, the kernels that own queries: dQ, the mask's gradient, exact sums."""

import triton
import triton.language as tl
from fastllm.kernels.attention_scores import adjusted, bounds, kept, read, seen, softcap_slope, span


@triton.jit
def dq_kernel(
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
def sum_again_kernel(
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
