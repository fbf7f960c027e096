"""The gradient of an embedding's weight: deterministic, without atomics, in fp32.

Indices are sorted stably, so that the rows of one index follow each other in their order. A
program that stands at the first of them adds them all up; the others have nothing to do.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on

# (BLOCK, num_warps): columns a program owns
CONFIGS = ((256, 1), (512, 2), (1024, 4))


def default_config(cols):
    """A block as wide as the row, within bounds."""
    block = max(32, min(1024, triton.next_power_of_2(cols)))
    return block, max(1, block // 256)


@triton.jit(do_not_specialize=["padding_idx"])
def _embedding_bwd_kernel(
    dy_ptr,
    sorted_ptr,
    order_ptr,
    ends_ptr,
    grad_ptr,
    cols,
    padding_idx,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (i, c) owns column block c of the index at place i of the sorted ones, if it is the
    # first of its kind.
    place = tl.program_id(0).to(tl.int64)
    index = tl.load(sorted_ptr + place).to(tl.int64)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1).to(tl.int64)
    end = tl.load(ends_ptr + place)
    # an empty range where there is nothing to do
    end = tl.where((index == before) | (index == padding_idx), place, end)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(place, end):
        row = tl.load(order_ptr + i)
        total += tl.load(dy_ptr + row * cols + col, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        total /= tl.maximum(end - place, 1).to(tl.float32)
    mask = mask & (end > place)
    tl.store(grad_ptr + index * cols + col, total.to(grad_ptr.dtype.element_ty), mask=mask)


def embedding_bwd(dy, index, rows, padding_idx, scale_grad_by_freq, config=None):
    """The gradient [rows, cols] of the weight, from contiguous dy [*index.shape, cols]."""
    cols = dy.shape[-1]
    grad = torch.zeros((rows, cols), dtype=dy.dtype, device=dy.device)
    if dy.numel() == 0:
        return grad
    found, order = torch.sort(index.reshape(-1), stable=True)
    ends = torch.searchsorted(found, found, right=True)
    block, warps = config or default_config(cols)
    with on(dy.device):
        _embedding_bwd_kernel[(found.numel(), triton.cdiv(cols, block))](
            dy, found, order, ends, grad, cols, padding_idx, scale_grad_by_freq, block,
            num_warps=warps,
        )  # fmt: skip
    return grad
