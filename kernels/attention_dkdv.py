"""Attention backward, the kernel that owns keys: dK and dV; attention_backward.py says how."""

import triton
import triton.language as tl
from fastllm.kernels.attention_scores import adjusted, bounds, kept, read, seen, softcap_slope


@triton.jit
def dkdv_kernel(
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
