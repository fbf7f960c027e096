"""RMSNorm and LayerNorm, with or without a residual added first; forward and backward.

Rows of `cols` values, normalized in fp32 and rounded once:

    h = x + residual, rounded to x's dtype        (only where a residual is given)
    y = (h - mean) * rstd * (weight + offset) + bias

with mean = 0 and rstd = 1 / sqrt(mean(h^2) + eps) for RMSNorm (Zhang and Sennrich, 2019), and the
mean and the variance of the row for LayerNorm (Ba et al., 2016). The backward pass recomputes mean
and rstd from h. With g = dy * (weight + offset) and n = (h - mean) * rstd:

    dh = rstd * (g - mean(g) - n * mean(g * n)) + dh_next       (RMSNorm: without mean(g))
    dweight = sum over rows of dy * n,  dbias = sum over rows of dy

Weight gradients are summed without atomics, in an order fixed by the shape and the device: each
program of a persistent grid writes one row of partial sums, and a second kernel adds those up.
"""

import functools

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import MAX_WARPS, multiprocessors, on
from fastllm.kernels.reduce import exact_mean, lane_counts, lane_moments, sum_partials

# The longest rows that stay in registers: 32 values a lane forward, 16 backward, which also holds
# dy, the weight and both sums of weight gradients.
MAX_FORWARD = 32768
MAX_BACKWARD = 8192


@triton.jit
def _load_scale(weight_ptr, offset, col, cols):
    """The row weight + offset in fp32; needs a weight."""
    w = tl.load(weight_ptr + col, mask=col < cols, other=0.0, eviction_policy="evict_last")
    return w.to(tl.float32) + offset


@triton.jit
def _load_sum(x_ptr, residual_ptr, at, mask, AGAIN: tl.constexpr = False):
    """x, or x + residual rounded to x's dtype; in that dtype. AGAIN: it will be read again."""
    EVICTION: tl.constexpr = "evict_last" if AGAIN else "evict_first"
    x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy=EVICTION)
    if residual_ptr is not None:
        r = tl.load(residual_ptr + at, mask=mask, other=0.0, eviction_policy=EVICTION)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(x_ptr.dtype.element_ty)
    return x


@triton.jit(do_not_specialize=["rows"])
def _norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    rows,
    cols,
    eps,
    offset,
    CENTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # Each program owns BLOCK_ROWS whole rows and holds them in registers.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (row < rows) & (col < cols)
    at = row * cols + col  # [BLOCK_ROWS, BLOCK_COLS]
    h = _load_sum(x_ptr, residual_ptr, at, mask)
    if residual_ptr is not None:
        tl.store(h_ptr + at, h, mask=mask)
    h = h.to(tl.float32)
    if CENTER:
        mean = exact_mean(tl.sum(h, axis=1, keep_dims=True), cols)
        h = tl.where(mask, h - mean, 0.0)
    square = tl.sum(h * h, axis=1, keep_dims=True) / cols
    y = h * tl.rsqrt(square + tl.cast(eps, tl.float32))
    if weight_ptr is not None:
        y *= _load_scale(weight_ptr, tl.cast(offset, tl.float32), col, cols)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_fwd_long_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    h_ptr,
    cols,
    eps,
    offset,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program owns one row, read twice: the second time out of the L2 cache.
    base = tl.program_id(0).to(tl.int64) * cols
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    step = 0.0
    for start in range(0, cols, BLOCK):
        col = start + lane
        mask = col < cols
        at = base + col
        h = _load_sum(x_ptr, residual_ptr, at, mask, AGAIN=True)
        if residual_ptr is not None:
            tl.store(h_ptr + at, h, mask=mask)
        h = h.to(tl.float32)
        if CENTER:
            step += 1.0
            mean, m2 = lane_moments(h, mask, step, mean, m2)
        else:
            m2 += h * h
    center = 0.0
    if CENTER:
        count = lane_counts(cols, BLOCK)
        center = exact_mean(tl.sum(mean * count, axis=0), cols)
        m2 += count * (mean - center) * (mean - center)
    rstd = tl.rsqrt(tl.sum(m2, axis=0) / cols + tl.cast(eps, tl.float32))
    for start in range(0, cols, BLOCK):
        col = start + lane
        mask = col < cols
        at = base + col
        # h is computed again, not read back: another lane may have stored it
        y = (_load_sum(x_ptr, residual_ptr, at, mask).to(tl.float32) - center) * rstd
        if weight_ptr is not None:
            y *= _load_scale(weight_ptr, tl.cast(offset, tl.float32), col, cols)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    cols,
    eps,
    offset,
    CENTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Program p of P owns the row blocks p, p + P, ... and row p of the partial sums.
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_COLS)[None, :]
    dw = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    db = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    if weight_ptr is not None:
        scale = _load_scale(weight_ptr, tl.cast(offset, tl.float32), col, cols)
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=STAGES):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        at = row * cols + col  # [BLOCK_ROWS, BLOCK_COLS]
        n = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if CENTER:
            mean = exact_mean(tl.sum(n, axis=1, keep_dims=True), cols)
            n = tl.where(mask, n - mean, 0.0)
        square = tl.sum(n * n, axis=1, keep_dims=True) / cols
        # rows past the end are zeros: with eps = 0 their rstd would be infinite
        rstd = tl.where(row < rows, tl.rsqrt(square + tl.cast(eps, tl.float32)), 0.0)
        n *= rstd
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g *= scale
            along = tl.sum(g * n, axis=1, keep_dims=True) / cols
            dx = g - n * along
            if CENTER:
                dx -= tl.sum(g, axis=1, keep_dims=True) / cols
            dx *= rstd
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dy * n
        if db_ptr is not None:
            db += dy
    partial = program * cols + col
    if dw_ptr is not None:
        tl.store(dw_ptr + partial, tl.sum(dw, axis=0, keep_dims=True), mask=col < cols)
    if db_ptr is not None:
        tl.store(db_ptr + partial, tl.sum(db, axis=0, keep_dims=True), mask=col < cols)


@triton.jit
def _norm_bwd_stats_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    stats_ptr,
    cols,
    eps,
    offset,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program owns one long row and writes its mean, rstd, mean(g) and mean(g * n).
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    step = 0.0
    for start in range(0, cols, BLOCK):
        col = start + lane
        mask = col < cols
        h = tl.load(h_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= _load_scale(weight_ptr, tl.cast(offset, tl.float32), col, cols)
        if CENTER:
            # Welford for h and g together: cross is the sum of (h - mean) * (g - mean(g))
            step += 1.0
            delta = tl.where(mask, h - mean, 0.0)
            mean += delta / step
            total += g
            m2 += delta * tl.where(mask, h - mean, 0.0)
            cross += delta * tl.where(mask, g - total / step, 0.0)
        else:
            m2 += h * h
            cross += g * h
    center = 0.0
    center_g = 0.0
    if CENTER:
        count = lane_counts(cols, BLOCK)
        center = exact_mean(tl.sum(mean * count, axis=0), cols)
        center_g = tl.sum(total, axis=0) / cols
        m2 += count * (mean - center) * (mean - center)
        cross += (mean - center) * (total - count * center_g)
    rstd = tl.rsqrt(tl.sum(m2, axis=0) / cols + tl.cast(eps, tl.float32))
    tl.store(stats_ptr + 4 * row, center)
    tl.store(stats_ptr + 4 * row + 1, rstd)
    tl.store(stats_ptr + 4 * row + 2, center_g)
    tl.store(stats_ptr + 4 * row + 3, tl.sum(cross, axis=0) / cols * rstd)


@triton.jit(do_not_specialize=["rows"])
def _norm_bwd_tile_kernel(
    dy_ptr,
    dh_ptr,
    h_ptr,
    weight_ptr,
    stats_ptr,
    dx_ptr,
    dw_ptr,
    db_ptr,
    rows,
    cols,
    offset,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Program (p, c) owns the columns of block c in the rows p, p + P, ...
    program = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        at = row * cols + col
        mean = tl.load(stats_ptr + 4 * row)
        rstd = tl.load(stats_ptr + 4 * row + 1)
        mean_g = tl.load(stats_ptr + 4 * row + 2)
        along = tl.load(stats_ptr + 4 * row + 3)
        n = (tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g *= _load_scale(weight_ptr, tl.cast(offset, tl.float32), col, cols)
            dx = (g - mean_g - n * along) * rstd
            if dh_ptr is not None:
                dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dy * n
        if db_ptr is not None:
            db += dy
    if dw_ptr is not None:
        tl.store(dw_ptr + program * cols + col, dw, mask=mask)
    if db_ptr is not None:
        tl.store(db_ptr + program * cols + col, db, mask=mask)


@functools.cache
def _tile(cols, many, elements, lane_elements):
    """(BLOCK_ROWS, BLOCK_COLS, num_warps) of a tile: several rows where they are short and many.

    `elements` is the least a tile of many rows holds, `lane_elements` what one lane holds of it.
    """
    block = triton.next_power_of_2(cols)
    rows = min(128, max(1, elements // block)) if many else 1
    return rows, block, max(1, min(MAX_WARPS, rows * block // (32 * lane_elements)))


def _forward(x, residual, weight, bias, cols, eps, offset, center):
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    if x.numel() == 0:
        return y, h
    rows, device = x.numel() // cols, x.device
    with on(device):
        if cols > MAX_FORWARD:
            _norm_fwd_long_kernel[(rows,)](
                x, residual, weight, bias, y, h, cols, eps, offset, center, 4096, num_warps=8
            )
            return y, h
        block_rows, block, warps = _tile(cols, rows >= 8 * multiprocessors(device), 4096, 32)
        _norm_fwd_kernel[(triton.cdiv(rows, block_rows),)](
            x, residual, weight, bias, y, h, rows, cols, eps, offset, center, block_rows, block,
            num_warps=warps,
        )  # fmt: skip
    return y, h


def _backward(dy, dh, h, weight, bias, cols, eps, offset, center, needs):
    dx = torch.empty_like(h) if needs[0] else None
    dw = torch.empty_like(weight) if needs[1] and weight is not None else None
    db = torch.empty_like(bias) if needs[2] and bias is not None else None
    if h.numel() == 0:
        return dx, *(None if d is None else d.zero_() for d in (dw, db))
    rows, device = h.numel() // cols, h.device
    sms = multiprocessors(device)
    with on(device):
        if cols > MAX_BACKWARD:
            block, stripes = 2048, triton.cdiv(cols, 2048)
            programs = min(rows, triton.cdiv(4 * sms, stripes))
        else:
            lane = 16 if cols > 2048 else 8
            block_rows, block, warps = _tile(cols, rows >= 8 * sms, 2048, lane)
            programs = min(triton.cdiv(rows, block_rows), sms * max(1, 16 // warps))
        sums = (dw is not None) + (db is not None)
        partial = torch.empty((sums, programs, cols), dtype=torch.float32, device=device)
        dw_sums = None if dw is None else partial[0]
        db_sums = None if db is None else partial[-1]
        if cols > MAX_BACKWARD:
            stats = torch.empty((rows, 4), dtype=torch.float32, device=device)
            _norm_bwd_stats_kernel[(rows,)](
                dy, h, weight, stats, cols, eps, offset, center, 4096, num_warps=8
            )
            _norm_bwd_tile_kernel[(programs, stripes)](
                dy, dh, h, weight, stats, dx, dw_sums, db_sums, rows, cols, offset, block, 2,
                num_warps=8,
            )  # fmt: skip
        else:
            _norm_bwd_kernel[(programs,)](
                dy, dh, h, weight, dx, dw_sums, db_sums, rows, cols, eps, offset, center,
                block_rows, block, 2, num_warps=warps,
            )  # fmt: skip
        sum_partials(partial, dw, db)
    return dx, dw, db


def rms_norm_fwd(x, residual, weight, cols, eps, offset):
    """(y, h) for contiguous x; residual may be None (then h is None), weight may be None."""
    return _forward(x, residual, weight, None, cols, eps, offset, False)


def layer_norm_fwd(x, residual, weight, bias, cols, eps, offset):
    """(y, h) for contiguous x; residual may be None (then h is None), weight and bias None."""
    return _forward(x, residual, weight, bias, cols, eps, offset, True)


def rms_norm_bwd(dy, dh, h, weight, cols, eps, offset, needs):
    """(dx, dweight) for contiguous dy and h; dh is the gradient of h from elsewhere, or None."""
    return _backward(dy, dh, h, weight, None, cols, eps, offset, False, (*needs, False))[:2]


def layer_norm_bwd(dy, dh, h, weight, bias, cols, eps, offset, needs):
    """(dx, dweight, dbias) for contiguous dy and h; dh is h's gradient from elsewhere, or None."""
    return _backward(dy, dh, h, weight, bias, cols, eps, offset, True, needs)
