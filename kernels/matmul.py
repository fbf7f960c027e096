"""Matrix products with an epilogue: C = activation(scale * A B + bias) + residual.

A is [M, K] and B is [K, N], each with any strides, so that y = x W^T, dx = dy W and dW = dy^T x are
all this product. A pair of products shares A: C = activation(A B) * (A B2), the gated linear unit
(Shazeer 2020). Sums are kept in fp32 and rounded once. Where K is split among programs, each writes
its partial sums and a second kernel adds those in order: no atomics, the result is deterministic.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import multiprocessors, on
from fastllm.kernels.matmul_configs import default_config
from fastllm.kernels.tiles import (
    activate,
    capability,
    contiguous_rows,
    describable,
    lanes,
    precision,
    tile_at,
    workspace,
)

MAX_BATCH = 65535  # programs along the third axis of a grid


@triton.jit
def accumulate(
    a_ptr,
    b_ptr,
    b2_ptr,
    row,
    col,
    M,
    N,
    K,
    begin,
    end,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of rows `row` [BLOCK_M] and columns `col` [BLOCK_N] over K from begin to end."""
    k = tl.arange(0, BLOCK_K)
    at = begin + k.to(tl.int64)
    a = a_ptr + row[:, None] * stride_am + at[None, :] * stride_ak  # [BLOCK_M, BLOCK_K]
    b_at = at[:, None] * stride_bk + col[None, :] * stride_bn  # [BLOCK_K, BLOCK_N]
    step_a = tl.cast(BLOCK_K, tl.int64) * stride_ak
    step_b = tl.cast(BLOCK_K, tl.int64) * stride_bk
    row_in, col_in = (row < M)[:, None], (col < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc2 = acc
    for start in range(begin, end, BLOCK_K):
        if EVEN_K:
            a_mask, b_mask = row_in, col_in
        else:
            inside = start + k < K
            a_mask, b_mask = row_in & inside[None, :], col_in & inside[:, None]
        left = tl.load(a, mask=a_mask, other=0.0)
        acc = tl.dot(
            left, tl.load(b_ptr + b_at, mask=b_mask, other=0.0), acc, input_precision=PRECISION
        )
        if b2_ptr is not None:
            right = tl.load(b2_ptr + b_at, mask=b_mask, other=0.0)
            acc2 = tl.dot(left, right, acc2, input_precision=PRECISION)
        a += step_a
        b_at += step_b
    return acc, acc2


@triton.jit
def _finish(
    acc,
    acc2,
    row,
    col,
    M,
    N,
    bias_ptr,
    residual_ptr,
    c_ptr,
    pre_ptr,
    pre2_ptr,
    stride_rm,
    stride_cm,
    scale,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
):
    """The epilogue of one tile, and its stores. ADD: to what is in C."""
    mask = (row < M)[:, None] & (col < N)[None, :]
    acc *= scale
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    own = row[:, None] * N + col[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + own, acc.to(pre_ptr.dtype.element_ty), mask=mask)
    y = activate(acc, ACTIVATION)
    if GATED:
        if pre2_ptr is not None:
            tl.store(pre2_ptr + own, acc2.to(pre2_ptr.dtype.element_ty), mask=mask)
        y *= acc2
    if residual_ptr is not None:
        at = row[:, None] * stride_rm + col[None, :]
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    at = row[:, None] * stride_cm + col[None, :]
    if ADD:
        y += tl.load(c_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(c_ptr + at, y.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _matmul_kernel(
    a_ptr,
    b_ptr,
    b2_ptr,
    bias_ptr,
    residual_ptr,
    c_ptr,
    pre_ptr,
    pre2_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_rm,
    stride_cm,
    stride_az,
    stride_bz,
    stride_cz,
    scale,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    # Program (p, s, z) of (P, S, Z) owns the tiles p, p + P, ... of product z of the batch, and of
    # each the s-th part of K; where S > 1, C is [S, M, N] and takes the bare sums.
    z = tl.program_id(2).to(tl.int64)
    a_ptr += z * stride_az
    b_ptr += z * stride_bz
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, K)
    c_ptr += tl.program_id(1).to(tl.int64) * M * stride_cm + z * stride_cz
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc, acc2 = accumulate(
            a_ptr, b_ptr, b2_ptr, row, col, M, N, K, begin, end, stride_am, stride_ak, stride_bk,
            stride_bn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
        )  # fmt: skip
        _finish(
            acc, acc2, row, col, M, N, bias_ptr, residual_ptr, c_ptr, pre_ptr, pre2_ptr, stride_rm,
            stride_cm, tl.cast(scale, tl.float32), b2_ptr is not None, ACTIVATION, ADD,
        )  # fmt: skip


@triton.jit
def _describe(
    ptr,
    rows,
    cols,
    stride,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """A descriptor of a matrix's blocks; of its transpose's where those are what is contiguous."""
    if TRANSPOSED:
        return tl.make_tensor_descriptor(ptr, [cols, rows], [stride, 1], [BLOCK_COLS, BLOCK_ROWS])
    else:
        return tl.make_tensor_descriptor(ptr, [rows, cols], [stride, 1], [BLOCK_ROWS, BLOCK_COLS])


@triton.jit
def _block(descriptor, row, col, TRANSPOSED: tl.constexpr):
    """The block at (row, col) of a matrix that `_describe` described."""
    if TRANSPOSED:
        return descriptor.load([col, row]).T
    else:
        return descriptor.load([row, col])


@triton.jit
def _matmul_tma_kernel(
    a_ptr,
    b_ptr,
    b2_ptr,
    bias_ptr,
    residual_ptr,
    c_ptr,
    pre_ptr,
    pre2_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_rm,
    stride_cm,
    scale,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    # As _matmul_kernel with one part of K; blocks past an edge are zero where TMA fills them in.
    a = _describe(a_ptr, M, K, stride_a, A_TRANSPOSED, BLOCK_M, BLOCK_K)
    b = _describe(b_ptr, K, N, stride_b, B_TRANSPOSED, BLOCK_K, BLOCK_N)
    if b2_ptr is not None:
        b2 = _describe(b2_ptr, K, N, stride_b, B_TRANSPOSED, BLOCK_K, BLOCK_N)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0),
        tiles_m * tiles_n,
        tl.num_programs(0),
        flatten=FLATTEN,
    ):
        tile_m, tile_n = tile_at(tile, tiles_m, tiles_n, GROUP_M)
        at_m, at_n = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc2 = acc
        for step in tl.range(tl.cdiv(K, BLOCK_K), warp_specialize=SPECIALIZE):
            left = _block(a, at_m, step * BLOCK_K, A_TRANSPOSED)
            right = _block(b, step * BLOCK_K, at_n, B_TRANSPOSED)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            if b2_ptr is not None:
                right2 = _block(b2, step * BLOCK_K, at_n, B_TRANSPOSED)
                acc2 = tl.dot(left, right2, acc2, input_precision=PRECISION)
        row = at_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        col = at_n.to(tl.int64) + tl.arange(0, BLOCK_N)
        _finish(
            acc, acc2, row, col, M, N, bias_ptr, residual_ptr, c_ptr, pre_ptr, pre2_ptr, stride_rm,
            stride_cm, tl.cast(scale, tl.float32), b2_ptr is not None, ACTIVATION, ADD,
        )  # fmt: skip


@triton.jit
def _add_splits_kernel(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    c_ptr,
    pre_ptr,
    M,
    N,
    stride_rm,
    stride_cm,
    scale,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Program (m, n) owns one block of C: it adds up the parts in order and runs the epilogue.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None] * N + col[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(parts_ptr + at + part * tl.cast(M, tl.int64) * N, mask=mask, other=0.0)
    _finish(
        acc, acc, row, col, M, N, bias_ptr, residual_ptr, c_ptr, pre_ptr, None, stride_rm,
        stride_cm, tl.cast(scale, tl.float32), False, ACTIVATION, ADD,
    )  # fmt: skip


def matmul(
    a, b, bias=None, residual=None, *, activation=None, scale=1.0, out=None, accumulate=False,
    preactivation=False, tf32=False, config=None,
):  # fmt: skip
    """(C, pre): C = activation(scale * A B + bias) + residual for a [M, K], b [K, N], any strides.

    bias [N] and residual [M, N] may be None. `out`: C itself, of any float dtype, with contiguous
    rows; accumulate: the product is added to it. pre = scale * A B + bias if preactivation is asked
    for, else None. tf32: products of fp32 operands may be rounded to TF32. config: None is the
    heuristic one, one that needs TMA runs without where TMA cannot describe the operands.
    """
    return _launch(
        a, b, None, bias, residual, activation, scale, out, accumulate, preactivation, tf32, config
    )[:2]


def heuristic(device, m, k, n, dtype, products, plain, tf32):
    """The config to take untried; plain: no epilogue to speak of."""
    chip, sms = capability(device), multiprocessors(device)
    held = 128 if plain and products == 1 else lanes(chip, plain or products == 2)
    return default_config(m, n, k, dtype, chip, sms, tf32=tf32, products=products, lanes=held)


def pick(a, b, products, plain, tf32):
    """The config of a product; who asks the tuner puts something better here."""
    return heuristic(a.device, *a.shape, b.shape[1], a.dtype, products, plain, tf32)


def gated_matmul(a, b, b2, *, activation="silu", preactivation=False, tf32=False, config=None):
    """(C, pre, pre2): C = activation(A B) * (A B2) in one pass over A.

    a [M, K]; b and b2 [K, N]. pre = A B and pre2 = A B2 if preactivation is asked for, else None.
    """
    if b2.stride() != b.stride():
        b, b2 = b.contiguous(), b2.contiguous()
    return _launch(a, b, b2, None, None, activation, 1.0, None, False, preactivation, tf32, config)


def _launch(
    a, b, b2, bias, residual, activation, scale, out, accumulate, preactivation, tf32, config
):  # fmt: skip
    (m, k), n, dtype = a.shape, b.shape[1], a.dtype
    c = torch.empty((m, n), dtype=dtype, device=a.device) if out is None else out
    pre = torch.empty((m, n), dtype=dtype, device=a.device) if preactivation else None
    pre2 = torch.empty_like(pre) if preactivation and b2 is not None else None
    if not m or not n:
        return c, pre, pre2
    if config is None:
        plain = activation is None and residual is None and not preactivation
        config = pick(a, b, 1 if b2 is None else 2, plain, tf32)
    bias = None if bias is None else bias.contiguous()
    residual = contiguous_rows(residual)
    stride_rm = 0 if residual is None else residual.stride(0)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    programs = min(tiles, multiprocessors(a.device)) if config.persistent else tiles
    rounding = precision(dtype, tf32)
    strides = (*a.stride(), *b.stride())
    blocks = (config.block_m, config.block_n, config.block_k, config.group_m)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    with on(a.device):
        if config.tma and k and describable(a, b, b2):
            triton.set_allocator(workspace)
            _matmul_tma_kernel[(programs,)](
                a, b, b2, bias, residual, c, pre, pre2, m, n, k, max(a.stride()), max(b.stride()),
                stride_rm, c.stride(0), scale, a.stride(1) != 1, b.stride(1) != 1, activation,
                accumulate, rounding, *blocks, config.specialize, config.persistent, **options,
            )  # fmt: skip
            return c, pre, pre2
        even = k % config.block_k == 0
        split = config.split_k if b2 is None else 1
        if split == 1:
            _matmul_kernel[(programs, 1, 1)](
                a, b, b2, bias, residual, c, pre, pre2, m, n, k, *strides, stride_rm, c.stride(0),
                0, 0, 0, scale, activation, accumulate, rounding, *blocks, 1, even, **options,
            )  # fmt: skip
            return c, pre, pre2
        parts = torch.empty((split, m, n), dtype=torch.float32, device=a.device)
        _matmul_kernel[(programs, split, 1)](
            a, b, None, None, None, parts, None, None, m, n, k, *strides, 0, n, 0, 0, 0, 1.0, None,
            False, rounding, *blocks, split, even, **options,
        )  # fmt: skip
        block_m, block_n = 16, 64
        _add_splits_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
            parts, bias, residual, c, pre, m, n, stride_rm, c.stride(0), scale, activation,
            accumulate, split, block_m, block_n, num_warps=4,
        )  # fmt: skip
    return c, pre, pre2


def batched_matmul(a, b, *, tf32=False, config=None):
    """C[z] = A[z] B[z] for a [Z, M, K] and b [Z, K, N], any strides (0 where one is shared)."""
    (batch, m, k), n = a.shape, b.shape[2]
    c = torch.empty((batch, m, n), dtype=a.dtype, device=a.device)
    if not c.numel():
        return c
    if config is None:
        tiles = max(1, multiprocessors(a.device) // batch)
        config = default_config(m, n, k, a.dtype, capability(a.device), tiles, tf32=tf32)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    blocks = (config.block_m, config.block_n, config.block_k, config.group_m)
    with on(a.device):
        for first in range(0, batch, MAX_BATCH):
            part = slice(first, first + MAX_BATCH)
            _matmul_kernel[(tiles, 1, min(MAX_BATCH, batch - first))](
                a[part], b[part], None, None, None, c[part], None, None, m, n, k, *a.stride()[1:],
                *b.stride()[1:], 0, n, a.stride(0), b.stride(0), m * n, 1.0, None, False,
                precision(a.dtype, tf32), *blocks, 1, k % config.block_k == 0,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
    return c
