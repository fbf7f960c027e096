"""residual + dropout(input), and its backward: the mask is made again instead of being read.

Element i, counted in order, is row i // 2^15 and column i % 2^15 of attention's mask of head 0.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.attention_scores import kept
from fastllm.kernels.device import on

_BLOCK, _WARPS = 2048, 4


@triton.jit
def _dropout_kernel(
    x_ptr, residual_ptr, y_ptr, seed_ptr, n, factor, threshold, BLOCK: tl.constexpr
):
    # Each program owns BLOCK elements.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    first = tl.full([], 0, tl.int32)
    stays = kept(tl.load(seed_ptr), first, at >> 15, at & 0x7FFF, threshold)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.where(stays, tl.cast(factor, tl.float32), 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def dropout(x, residual, seed, factor, threshold):
    """residual + x, where it is kept, * factor, of contiguous tensors; residual None: without."""
    y = torch.empty_like(x)
    n = x.numel()
    if n == 0:
        return y
    with on(x.device):
        _dropout_kernel[(triton.cdiv(n, _BLOCK),)](
            x, residual, y, seed, n, factor, threshold, _BLOCK, num_warps=_WARPS
        )
    return y
