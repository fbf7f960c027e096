"""softmax and log_softmax over contiguous rows; forward and backward, in fp32, rounded once.

Short rows stay in registers; long ones are read twice, the second time out of the L2 cache, with a
running maximum and sum in each lane (Milakov and Gimelshein, 2018).
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on
from fastllm.kernels.loss import _block, _row_lse


@triton.jit
def _softmax_fwd_kernel(x_ptr, y_ptr, cols, LOG: tl.constexpr, BLOCK: tl.constexpr):
    # Each program owns one row.
    base = tl.program_id(0).to(tl.int64) * cols
    top, total = _row_lse(x_ptr, base, cols, 1.0, 0.0, False, BLOCK)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        y = tl.load(x_ptr + base + col, mask=mask, other=0.0).to(tl.float32) - top
        y = y - tl.log(total) if LOG else tl.exp(y) / total
        tl.store(y_ptr + base + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_bwd_kernel(dy_ptr, y_ptr, dx_ptr, cols, LOG: tl.constexpr, BLOCK: tl.constexpr):
    # Each program owns one row.
    base = tl.program_id(0).to(tl.int64) * cols
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        dy = tl.load(dy_ptr + base + col, mask=mask, other=0.0).to(tl.float32)
        if not LOG:
            dy *= tl.load(y_ptr + base + col, mask=mask, other=0.0).to(tl.float32)
        total += dy
    all_ = tl.sum(total, axis=0)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < cols
        dy = tl.load(dy_ptr + base + col, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + base + col, mask=mask, other=0.0).to(tl.float32)
        dx = dy - tl.exp(y) * all_ if LOG else y * (dy - all_)
        tl.store(dx_ptr + base + col, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def softmax_fwd(x, log):
    """softmax, or its logarithm, over the last dimension of contiguous x."""
    y = torch.empty_like(x)
    cols = x.shape[-1] if x.dim() else 1
    if x.numel():
        block, warps = _block(cols, 4096)
        with on(x.device):
            _softmax_fwd_kernel[(x.numel() // cols,)](x, y, cols, log, block, num_warps=warps)
    return y


def softmax_bwd(dy, y, log):
    """The gradient of softmax_fwd's input, from its output y and the upstream gradient."""
    dx = torch.empty_like(y)
    cols = y.shape[-1] if y.dim() else 1
    if y.numel():
        block, warps = _block(cols, 4096)
        with on(y.device):
            _softmax_bwd_kernel[(y.numel() // cols,)](dy, y, dx, cols, log, block, num_warps=warps)
    return dx
