"""Activations and gated products: y = f(x) or y = f(gate) * up, forward and backward.

fp32 math, one rounding. FUNCTION is 0 SiLU, 1 GELU, 2 GELU by tanh, 3 squared ReLU. The backward
pass computes f again from its input:

    dx = dy * up * f'(x),  dup = dy * f(x)

Inputs are rows of adjacent columns, `stride` elements apart, so that halves of a fused projection
are read where they are; a contiguous tensor is one row. Outputs are contiguous.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on

# (BLOCK, num_warps): values a program owns
CONFIGS = ((1024, 4), (2048, 4), (4096, 8))


def default_config(size):
    """Few values: small programs, to have enough of them."""
    return (1024, 4) if size < 2**20 else (2048, 4)


@triton.jit
def _sigmoids(x):
    """1 / (1 + e^-x) and 1 / (1 + e^x), neither by subtraction."""
    e = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _point(x, FUNCTION: tl.constexpr):
    """f(x) and f'(x)."""
    if FUNCTION == 0:
        s, rest = _sigmoids(x)
        value = x * s
        slope = s * (1.0 + x * rest)
    elif FUNCTION == 1:
        cumulative = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cumulative
        slope = cumulative + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif FUNCTION == 2:
        square = x * x
        s, rest = _sigmoids(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        value = x * s
        slope = s * (1.0 + 1.5957691216057308 * x * (1.0 + 0.134145 * square) * rest)
    else:
        r = tl.where(x < 0, 0.0, x)
        value = r * r
        slope = r + r
    return value, slope


@triton.jit
def _place(rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows and columns of a program's tile, in int64, and which of them exist."""
    across = tl.cdiv(cols, BLOCK_COLS)
    program = tl.program_id(0).to(tl.int64)
    row = program // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = program % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    return row, col, (row < rows) & (col < cols)


@triton.jit(do_not_specialize=["rows"])
def _activation_fwd_kernel(
    x_ptr,
    up_ptr,
    y_ptr,
    rows,
    cols,
    x_stride,
    up_stride,
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # A program owns a tile of [BLOCK_ROWS, BLOCK_COLS] values.
    row, col, mask = _place(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    y, _ = _point(x, FUNCTION)
    if up_ptr is not None:
        y *= tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * cols + col, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _activation_bwd_kernel(
    dy_ptr,
    x_ptr,
    up_ptr,
    dx_ptr,
    dup_ptr,
    rows,
    cols,
    dy_stride,
    x_stride,
    up_stride,
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # A program owns a tile of [BLOCK_ROWS, BLOCK_COLS] values.
    row, col, mask = _place(rows, cols, BLOCK_ROWS, BLOCK_COLS)
    dy = tl.load(dy_ptr + row * dy_stride + col, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    value, slope = _point(x, FUNCTION)
    at = row * cols + col
    if dup_ptr is not None:
        tl.store(dup_ptr + at, (dy * value).to(dup_ptr.dtype.element_ty), mask=mask)
    if dx_ptr is not None:
        if up_ptr is not None:
            dy *= tl.load(up_ptr + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)


def _tile(rows, cols, block):
    """(BLOCK_ROWS, BLOCK_COLS, programs) of tiles of about `block` values."""
    block_cols = min(block, triton.next_power_of_2(cols))
    block_rows = min(block // block_cols, triton.next_power_of_2(rows))
    return block_rows, block_cols, triton.cdiv(rows, block_rows) * triton.cdiv(cols, block_cols)


def activation_fwd(function, x, up, rows, cols, x_stride, up_stride, config=None):
    """f(x), or f(x) * up where up is not None: contiguous, of x's shape."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if rows * cols == 0:
        return y
    block, warps = config or default_config(rows * cols)
    block_rows, block_cols, programs = _tile(rows, cols, block)
    with on(x.device):
        _activation_fwd_kernel[(programs,)](
            x, up, y, rows, cols, x_stride, up_stride, function, block_rows, block_cols,
            num_warps=warps,
        )  # fmt: skip
    return y


def activation_bwd(
    function, dy, x, up, rows, cols, dy_stride, x_stride, up_stride, needs, config=None
):
    """(dx, dup), None where not needed; up may be None, then dup is."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dup = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[1] else None
    if rows * cols == 0 or not any(needs):
        return dx, dup
    block, warps = config or default_config(rows * cols)
    block_rows, block_cols, programs = _tile(rows, cols, block)
    with on(x.device):
        _activation_bwd_kernel[(programs,)](
            dy, x, up, dx, dup, rows, cols, dy_stride, x_stride, up_stride, function, block_rows,
            block_cols, num_warps=warps,
        )  # fmt: skip
    return dx, dup
