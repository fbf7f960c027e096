"""Backward of the products: from dy to the gradients of operands and bias.

With z = x W^T + b and y = act(z) + residual: dz = dy act'(z), dx = dz W, dW = dz^T x, db = sum(dz).
With y = act(g) * u: dg = dy u act'(g), du = dy act(g). The sums of db are made in the pass that
makes dz, in an order fixed by the shape and the device.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import multiprocessors, on
from fastllm.kernels.matmul import matmul
from fastllm.kernels.reduce import sum_partials
from fastllm.kernels.tiles import activate, slope

_BLOCK_ROWS, _BLOCK_COLS = 16, 128


@triton.jit
def _slope_kernel(
    dy_ptr,
    extra_ptr,
    z_ptr,
    dz_ptr,
    db_ptr,
    rows,
    cols,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # Program (p, c) owns the columns of block c in the row blocks p, p + P, ... and row p of the
    # partial sums of db.
    col = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    db = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    program = tl.program_id(0).to(tl.int64)
    for block in range(program, tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        at = row * cols + col
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dz *= slope(z, ACTIVATION)
        if extra_ptr is not None:
            dz += tl.load(extra_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if dz_ptr is not None:
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        db += dz
    if db_ptr is not None:
        total = tl.sum(db, axis=0, keep_dims=True)
        tl.store(db_ptr + program * cols + col, total, mask=col < cols)


@triton.jit
def _gated_slope_kernel(
    dy_ptr,
    extra_gate_ptr,
    extra_up_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program owns BLOCK consecutive values.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dgate = dy * up * slope(gate, ACTIVATION)
    dup = dy * activate(gate, ACTIVATION)
    if extra_gate_ptr is not None:
        dgate += tl.load(extra_gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if extra_up_ptr is not None:
        dup += tl.load(extra_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=mask)


def slope_bwd(dy, z, activation, *, extra=None, bias_dtype=None):
    """(dz, db) from contiguous dy [M, N], z alike or None, and dz's gradient from elsewhere.

    dz is dy itself where there is nothing to multiply or add; db is None without bias_dtype.
    """
    rows, cols = dy.shape
    if activation is None:
        z = None
    same = z is None and extra is None
    dz = None if same else torch.empty_like(dy)
    db = None if bias_dtype is None else torch.zeros(cols, dtype=bias_dtype, device=dy.device)
    if dy.numel() and not (same and db is None):
        stripes = triton.cdiv(cols, _BLOCK_COLS)
        most = triton.cdiv(8 * multiprocessors(dy.device), stripes)
        programs = min(triton.cdiv(rows, _BLOCK_ROWS), most)
        partial = None
        with on(dy.device):
            if db is not None:
                partial = torch.empty((1, programs, cols), dtype=torch.float32, device=dy.device)
            _slope_kernel[(programs, stripes)](
                dy, extra, z, dz, partial, rows, cols, activation, _BLOCK_ROWS, _BLOCK_COLS,
                num_warps=4,
            )  # fmt: skip
            if partial is not None:
                sum_partials(partial, db, None)
    return dy if same else dz, db


def gated_slope_bwd(dy, gate, up, activation, *, extra_gate=None, extra_up=None):
    """(dgate, dup) from contiguous dy, gate, up, and gradients of gate and up from elsewhere."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        with on(dy.device):
            _gated_slope_kernel[(triton.cdiv(dy.numel(), 1024),)](
                dy, extra_gate, extra_up, gate, up, dgate, dup, dy.numel(), activation, 1024,
                num_warps=4,
            )  # fmt: skip
    return dgate, dup


def operands_bwd(dz, x, weight, needs, *, tf32=False, configs=(None, None)):
    """(dx, dweight) = (dz W, dz^T x) for dz [M, N], x [M, K] and weight [N, K]; None: not needed.

    configs: of the one product and of the other.
    """
    dx = matmul(dz, weight, tf32=tf32, config=configs[0])[0] if needs[0] else None
    dw = matmul(dz.t(), x, tf32=tf32, config=configs[1])[0] if needs[1] else None
    return dx, dw
