"""y = x W^T + b with a weight of which two of every four neighbours are kept.

Half of the weight is read; a tile of it is expanded in registers and meets the tensor cores there.
With int8 activations the products are of int8 with sums of int32.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import MAX_WARPS, on
from fastllm.kernels.quant_matmul import quantize_tokens as quantize_tokens
from fastllm.kernels.tiles import tile_at


@triton.jit
def _expanded(values_ptr, kept_ptr, col, at, N, K, row_values, row_kept):
    """Weights [BLOCK_N, BLOCK_K] of the K positions `at`, zeros included; 0 past the edges."""
    inside = (col < N)[:, None] & (at < K)[None, :]
    byte = tl.load(kept_ptr + col[:, None] * row_kept + (at // 8)[None, :], mask=inside, other=0)
    four = (byte.to(tl.int32) >> (at & 4)[None, :]) & 15
    place = (at & 3)[None, :]
    below = four & ((1 << place) - 1)  # those that come before it
    rank = tl.minimum((below & 1) + ((below >> 1) & 1) + ((below >> 2) & 1), 1)
    here = inside & (((four >> place) & 1) != 0)
    source = col[:, None] * row_values + (at // 4 * 2)[None, :] + rank
    return tl.load(values_ptr + source, mask=here, other=0)


@triton.jit(do_not_specialize=["M"])
def _sparse_matmul_kernel(
    x_ptr,
    values_ptr,
    kept_ptr,
    scales_ptr,
    bias_ptr,
    token_scales_ptr,
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    row_values,
    row_kept,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Program t owns tile t of y
    tile_m, tile_n = tile_at(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for inner in range(0, K, BLOCK_K):
        at = inner + tl.arange(0, BLOCK_K)
        inside = (row < M)[:, None] & (at < K)[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xm + at[None, :], mask=inside, other=0)
        w = _expanded(values_ptr, kept_ptr, col, at, N, K, row_values, row_kept)
        if x.dtype == tl.int8:
            acc += tl.dot(x, w.T, out_dtype=tl.int32).to(tl.float32)
        else:
            acc = tl.dot(x, w.to(x.dtype).T, acc, input_precision="ieee")
    value = acc
    if scales_ptr is not None:
        value = value * tl.load(scales_ptr + col, mask=col < N, other=0)[None, :]
    if token_scales_ptr is not None:
        value = value * tl.load(token_scales_ptr + row, mask=row < M, other=0)[:, None]
    if bias_ptr is not None:
        value += tl.load(bias_ptr + col, mask=col < N, other=0).to(tl.float32)[None, :]
    keep = (row < M)[:, None] & (col < N)[None, :]
    out = row[:, None] * N + col[None, :]
    tl.store(y_ptr + out, value.to(y_ptr.dtype.element_ty), mask=keep)


# ---- launcher


def blocks(m):
    """Tokens, rows of the weight and K of a tile, warps and stages."""
    if m <= 16:
        return 16, 32, 128, 4, 3
    return (64, 64, 64, 4, 3) if m < 512 else (128, 64, 64, 8, 3)


def sparse_matmul(x, values, kept, scales, bias, *, token_scales=None, dtype=None):
    """x W^T + b [M, N] for x [M, K] of floats, or of int8 with token_scales [M].

    values [N, 2 ceil(K / 4)], kept [N, ceil(K / 8)] as fastllm.ops.sparse_linear.layout has them;
    scales [N] float32 where values are int8; dtype: of the result where x is int8.
    """
    (m, k), n = x.shape, values.shape[0]
    y = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    block_m, block_n, block_k, warps, stages = blocks(m)
    with on(x.device):
        _sparse_matmul_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
            x, values, kept, scales, bias, token_scales, y, m, n, k, x.stride(0), values.stride(0),
            kept.stride(0), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=min(warps, MAX_WARPS), num_stages=stages,
        )  # fmt: skip
    return y
