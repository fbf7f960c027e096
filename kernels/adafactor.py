"""Adafactor's two passes over a gradient of matrices: sums of squares, then the direction.

    by_row = sum_c g^2,  by_col = sum_r g^2
    u = g factor / sqrt(max(row col, floor2)),  and the sum of u^2

Partial sums are written and added up in a fixed order: the same result every time.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on

_ROWS, _COLS, _WARPS = 16, 256, 4


@triton.jit
def _squares_kernel(
    g_ptr, row_ptr, part_ptr, rows, cols, blocks, ROWS: tl.constexpr, COLS: tl.constexpr
):
    # Each program owns ROWS rows of one matrix: their sums, and what they add to each column's.
    matrix = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]  # [ROWS, COLS]
        at = (matrix * rows + row)[:, None] * cols + col[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(g * g, axis=1)
        part = (matrix * blocks + block) * cols + col
        tl.store(part_ptr + part, tl.sum(g * g, axis=0), mask=col < cols)
    tl.store(row_ptr + matrix * rows + row, total, mask=row < rows)


@triton.jit
def _direction_kernel(
    g_ptr, row_ptr, col_ptr, factor_ptr, u_ptr, sum_ptr, rows, cols, blocks, floor2,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Each program owns ROWS rows of one matrix and writes the sum of their squares.
    matrix = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    factor = tl.load(factor_ptr)
    by_row = tl.load(row_ptr + matrix * rows + row, mask=row < rows, other=1.0)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, cols, COLS):
        col = start + tl.arange(0, COLS)
        mask = (row < rows)[:, None] & (col < cols)[None, :]  # [ROWS, COLS]
        at = (matrix * rows + row)[:, None] * cols + col[None, :]
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32) * factor
        by_col = tl.load(col_ptr + matrix * cols + col, mask=col < cols, other=1.0)
        moment = by_row[:, None] * by_col[None, :]
        # NaN goes on
        moment = tl.where(moment < floor2, floor2, moment)
        u = tl.where(mask, tl.div_rn(g, tl.sqrt_rn(moment)), 0.0)
        tl.store(u_ptr + at, u, mask=mask)
        total += tl.sum(u * u, axis=1)
    tl.store(sum_ptr + matrix * blocks + block, tl.sum(total, axis=0))


def squares(g):
    """(by_row [.., R, 1], by_col [.., 1, C]) in float32 of a contiguous gradient [.., R, C]."""
    *lead, rows, cols = g.shape
    by_row = torch.zeros((*lead, rows, 1), device=g.device)
    blocks = triton.cdiv(rows, _ROWS)
    parts = torch.zeros((*lead, blocks, cols), device=g.device)
    if g.numel():
        with on(g.device):
            _squares_kernel[(blocks, g.numel() // (rows * cols))](
                g, by_row, parts, rows, cols, blocks, _ROWS, _COLS, num_warps=_WARPS
            )
    return by_row, parts.sum(-2, keepdim=True)


def direction(g, row, col, factor, floor2):
    """(u in float32, its sum of squares) for contiguous row [.., R, 1] and col [.., 1, C]; factor a
    float32 scalar on the device."""
    *_, rows, cols = g.shape
    u = torch.empty_like(g, dtype=torch.float32)
    if not g.numel():
        return u, torch.zeros((), device=g.device)
    blocks, matrices = triton.cdiv(rows, _ROWS), g.numel() // (rows * cols)
    sums = torch.empty((matrices, blocks), device=g.device)
    with on(g.device):
        _direction_kernel[(blocks, matrices)](
            g, row, col, factor, u, sums, rows, cols, blocks, floor2, _ROWS, _COLS,
            num_warps=_WARPS,
        )  # fmt: skip
    return u, sums.sum()
