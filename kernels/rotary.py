"""Rotary position embedding (Su et al. 2021), and its gradient, in fp32 with one rounding.

    y[i] = x[i] cos[i] - x[j] sin[i],  y[j] = x[j] cos[j] + x[i] sin[j]

for the pairs (i, j) = (i, i + R/2), or (2i, 2i + 1) where interleaved. The gradient is the
transposed rotation. Inputs may have any strides; columns from R on are passed through.
"""

import triton
import triton.language as tl
from fastllm.kernels.device import on

# (BLOCK, num_warps): pairs a program owns
CONFIGS = ((512, 4), (1024, 4), (2048, 8))


def default_config(size):
    """Few values: small programs, to have enough of them."""
    return (512, 4) if size < 2**20 else (1024, 4)


@triton.jit(do_not_specialize=["length"])
def _rotate_kernel(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    length,
    dim,
    rotary_dim,
    width,
    table_batch,
    x_batch,
    x_head,
    x_row,
    x_col,
    y_batch,
    y_head,
    y_row,
    y_col,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HALF_TABLE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    # A program owns BLOCK_T rows of one head of one batch entry.
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(length, BLOCK_T)
    row = program % blocks * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    head = program // blocks % heads
    batch = program // blocks // heads
    x_ptr += batch * x_batch + head * x_head + row * x_row
    y_ptr += batch * y_batch + head * y_head + row * y_row
    table = batch * table_batch + row * width
    half = rotary_dim // 2
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]  # [1, BLOCK_PAIRS]
    mask = (row < length) & (pair < half)
    first = pair * 2 if INTERLEAVED else pair
    second = pair * 2 + 1 if INTERLEAVED else pair + half
    a = tl.load(x_ptr + first * x_col, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + second * x_col, mask=mask, other=0.0).to(tl.float32)
    left = table + (pair if HALF_TABLE else first)
    right = table + (pair if HALF_TABLE else second)
    cos_a = tl.load(cos_ptr + left, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + right, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + left, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + right, mask=mask, other=0.0).to(tl.float32)
    if TRANSPOSED:
        low = a * cos_a + b * sin_b
        high = b * cos_b - a * sin_a
    else:
        low = a * cos_a - b * sin_a
        high = b * cos_b + a * sin_b
    tl.store(y_ptr + first * y_col, low.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + second * y_col, high.to(y_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST > 0:
        col = rotary_dim + tl.arange(0, BLOCK_REST)[None, :]
        mask = (row < length) & (col < dim)
        rest = tl.load(x_ptr + col * x_col, mask=mask, other=0.0)
        tl.store(y_ptr + col * y_col, rest, mask=mask)


def rotate(x, out, cos, sin, rotary_dim, interleaved, transposed, config=None):
    """Writes x [B, H, T, D], rotated, to out, which may be x; cos and sin are contiguous."""
    batch, heads, length, dim = x.shape
    if x.numel() == 0:
        return
    width = cos.shape[-1]
    table_batch = cos.shape[-2] * width if cos.dim() == 3 and cos.shape[0] > 1 else 0
    block, warps = config or default_config(x.numel())
    block_pairs = triton.next_power_of_2(rotary_dim // 2)
    block_t = max(1, min(block // block_pairs, triton.next_power_of_2(length)))
    rest = dim - rotary_dim
    with on(x.device):
        _rotate_kernel[(batch * heads * triton.cdiv(length, block_t),)](
            x, out, cos, sin, heads, length, dim, rotary_dim, width, table_batch, *x.stride(),
            *out.stride(), interleaved, transposed, width < rotary_dim, block_t, block_pairs,
            triton.next_power_of_2(rest) if rest else 0, num_warps=warps,
        )  # fmt: skip
