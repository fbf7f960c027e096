"""Products of the experts of a mixture: y[i] = W[e] x[i] + b[e] for the rows i of expert e.

Rows are sorted by expert; offsets [E] hold where each expert's rows end. They stay on the device:
every program reads all of them and finds its own tiles. What decreases or overruns in them is
clamped, so that no access leaves a buffer. Rows behind the last end are written as zeros.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import multiprocessors, on
from fastllm.kernels.matmul import accumulate
from fastllm.kernels.matmul_configs import default_config
from fastllm.kernels.tiles import capability, describable, lanes, precision, tile_at, workspace


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _segments(offsets_ptr, experts, tokens, BLOCK_E: tl.constexpr):
    """(first rows, ends) of all experts, and as expert number `experts` the rows of none."""
    expert = tl.arange(0, BLOCK_E)
    end = tl.load(offsets_ptr + expert, mask=expert < experts, other=2147483647)
    start = tl.load(offsets_ptr + expert - 1, mask=(expert > 0) & (expert <= experts), other=0)
    start = tl.associative_scan(tl.minimum(tl.maximum(start, 0), tokens), 0, _later)
    end = tl.associative_scan(tl.minimum(tl.maximum(end, 0), tokens), 0, _later)
    return start, tl.where(expert <= experts, end, start)


@triton.jit
def _pick(values, index, BLOCK_E: tl.constexpr):
    """values[index]"""
    return tl.sum(tl.where(tl.arange(0, BLOCK_E) == index, values, 0), axis=0)


@triton.jit
def _weight_block(descriptor, expert, row, col, TRANSPOSED: tl.constexpr):
    """The block at (row, col) of the [K, N] matrix of one expert."""
    if TRANSPOSED:  # stored as [N, K]
        block = descriptor.load([expert, col, row])
        return block.reshape(block.shape[1], block.shape[2]).T
    else:
        block = descriptor.load([expert, row, col])
        return block.reshape(block.shape[1], block.shape[2])


@triton.jit(do_not_specialize=["tokens", "experts"])
def _grouped_kernel(
    x_ptr,
    w_ptr,
    offsets_ptr,
    bias_ptr,
    y_ptr,
    tokens,
    N,
    K,
    experts,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wk,
    stride_wn,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
):
    # The tiles of all experts are numbered through; program p of P owns the tiles p, p + P, ...
    tiles_n = tl.cdiv(N, BLOCK_N)
    starts, ends = _segments(offsets_ptr, experts, tokens, BLOCK_E)
    tiles = tl.cdiv(ends - starts, BLOCK_M) * tiles_n
    lasts = tl.cumsum(tiles, 0)
    if TMA:
        x = tl.make_tensor_descriptor(x_ptr, [tokens, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
        if W_TRANSPOSED:
            w = tl.make_tensor_descriptor(
                w_ptr, [experts, N, K], [stride_we, stride_wn, 1], [1, BLOCK_N, BLOCK_K]
            )
        else:
            w = tl.make_tensor_descriptor(
                w_ptr, [experts, K, N], [stride_we, stride_wk, 1], [1, BLOCK_K, BLOCK_N]
            )
    for number in range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0)):
        expert = tl.sum((lasts <= number).to(tl.int32), axis=0)
        start, end = _pick(starts, expert, BLOCK_E), _pick(ends, expert, BLOCK_E)
        place = number - (_pick(lasts, expert, BLOCK_E) - _pick(tiles, expert, BLOCK_E))
        tile_m, tile_n = tile_at(place, tl.cdiv(end - start, BLOCK_M), tiles_n, GROUP_M)
        at_m, at_n = start + tile_m * BLOCK_M, tile_n * BLOCK_N
        row = at_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        col = at_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        inner = tl.where(expert < experts, K, 0)  # rows of no expert: an empty sum
        if TMA:
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for step in range(tl.cdiv(inner, BLOCK_K)):
                left = x.load([at_m, step * BLOCK_K])
                right = _weight_block(w, expert, step * BLOCK_K, at_n, W_TRANSPOSED)
                acc = tl.dot(left, right, acc, input_precision=PRECISION)
        else:
            acc, _ = accumulate(
                x_ptr, w_ptr + expert.to(tl.int64) * stride_we, None, row, col, end, N, inner, 0,
                inner, stride_xm, stride_xk, stride_wk, stride_wn, BLOCK_M, BLOCK_N, BLOCK_K,
                EVEN_K, PRECISION,
            )  # fmt: skip
        if bias_ptr is not None:
            known = (col < N) & (expert < experts)
            b = tl.load(bias_ptr + expert.to(tl.int64) * N + col, mask=known, other=0.0)
            acc += b.to(tl.float32)[None, :]
        mask = (row < end)[:, None] & (col < N)[None, :]
        at = row[:, None] * N + col[None, :]
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "experts"])
def _grouped_weight_kernel(
    dy_ptr,
    x_ptr,
    offsets_ptr,
    dw_ptr,
    tokens,
    experts,
    N,
    K,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Program (t, e) owns tile t of dW[e] [N, K] and sums over the rows of expert e.
    expert = tl.program_id(1)
    starts, ends = _segments(offsets_ptr, experts, tokens, BLOCK_E)
    start, end = _pick(starts, expert, BLOCK_E), _pick(ends, expert, BLOCK_E)
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc, _ = accumulate(
        dy_ptr, x_ptr, None, row, col, N, K, end, start, end, stride_dn, stride_dm, stride_xm,
        stride_xk, BLOCK_M, BLOCK_N, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    mask = (row < N)[:, None] & (col < K)[None, :]
    at = (expert.to(tl.int64) * N + row[:, None]) * K + col[None, :]
    if ADD:
        acc += tl.load(dw_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dw_ptr + at, acc.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "experts"])
def _grouped_bias_kernel(
    dy_ptr,
    offsets_ptr,
    db_ptr,
    tokens,
    experts,
    N,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # Program (c, e) owns column block c of db[e] and sums over the rows of expert e, in order.
    expert = tl.program_id(1)
    starts, ends = _segments(offsets_ptr, experts, tokens, BLOCK_E)
    start, end = _pick(starts, expert, BLOCK_E), _pick(ends, expert, BLOCK_E)
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for block in range(start, end, BLOCK_ROWS):
        row = block + tl.arange(0, BLOCK_ROWS)[:, None].to(tl.int64)
        mask = (row < end) & (col < N)
        total += tl.load(dy_ptr + row * N + col, mask=mask, other=0.0).to(tl.float32)
    db = tl.sum(total, axis=0, keep_dims=True)
    at = expert.to(tl.int64) * N + col
    tl.store(db_ptr + at, db.to(db_ptr.dtype.element_ty), mask=col < N)


def grouped_config(m, n, k, dtype, capability, sms, *, tf32=False):
    """The heuristic config of one expert's product on its share of the multiprocessors."""
    held = lanes(capability, True)
    return default_config(m, n, k, dtype, capability, max(1, sms), tf32=tf32, lanes=held)


def _config(m, n, k, x, experts, tf32):
    """As if the device were shared out evenly among the experts."""
    sms = multiprocessors(x.device) // max(1, experts)
    return grouped_config(m, n, k, x.dtype, capability(x.device), sms, tf32=tf32)


def _block_e(experts):
    return triton.next_power_of_2(experts + 1)


def _describable_experts(weights):
    """Whether TMA can describe [E, K, N]: one contiguous side, 16-byte strides."""
    stride, size = weights.stride(0), weights.element_size()
    return stride > 0 and stride * size % 16 == 0 and describable(weights[0])


def grouped_matmul(x, weights, offsets, bias=None, *, tf32=False, config=None):
    """y [tokens, N]: y[i] = x[i] W[e] + b[e] for the rows i of expert e.

    x [tokens, K]; weights [E, K, N], any strides: a transposed view gives x W^T; offsets [E] int32;
    bias [E, N] or None. config: None is the heuristic one.
    """
    (tokens, k), (experts, _, n) = x.shape, weights.shape
    y = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if config is None:
        config = _config(-(-tokens // max(1, experts)), n, k, x, experts, tf32)
    tiles = (triton.cdiv(tokens, config.block_m) + experts) * triton.cdiv(n, config.block_n)
    tma = bool(config.tma and k and experts and x.stride(1) == 1)
    tma = tma and describable(x) and _describable_experts(weights)
    with on(x.device):
        if tma:
            triton.set_allocator(workspace)
        _grouped_kernel[(min(tiles, multiprocessors(x.device)),)](
            x, weights, offsets.contiguous(), None if bias is None else bias.contiguous(), y,
            tokens, n, k, experts, *x.stride(), *weights.stride(),
            precision(x.dtype, tf32), config.block_m, config.block_n, config.block_k,
            config.group_m, k % config.block_k == 0, _block_e(experts), tma,
            weights.stride(1) == 1, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def grouped_weight_grad(
    dy, x, offsets, experts, *, out=None, accumulate=False, tf32=False, config=None
):
    """dW [E, N, K]: dW[e] = sum of dy[i] x[i]^T over the rows i of expert e; zero without rows.

    dy [tokens, N], x [tokens, K]. `out`: dW itself, contiguous, of any float dtype; accumulate: the
    gradient is added to it.
    """
    (tokens, n), k = dy.shape, x.shape[1]
    if out is None:
        out = torch.empty((experts, n, k), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    if config is None:
        config = _config(n, k, -(-tokens // experts), x, experts, tf32)
    tiles = triton.cdiv(n, config.block_m) * triton.cdiv(k, config.block_n)
    with on(x.device):
        _grouped_weight_kernel[(tiles, experts)](
            dy, x, offsets.contiguous(), out, tokens, experts, n, k, *dy.stride(), *x.stride(),
            accumulate, precision(x.dtype, tf32), config.block_m, config.block_n, config.block_k,
            config.group_m, _block_e(experts), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def grouped_bias_grad(dy, offsets, experts):
    """db [E, N]: the sum of dy [tokens, N] over the rows of each expert."""
    tokens, n = dy.shape
    db = torch.empty((experts, n), dtype=dy.dtype, device=dy.device)
    if db.numel():
        with on(dy.device):
            _grouped_bias_kernel[(triton.cdiv(n, 128), experts)](
                dy.contiguous(), offsets.contiguous(), db, tokens, experts, n, 16, 128,
                _block_e(experts), num_warps=4,
            )  # fmt: skip
    return db
