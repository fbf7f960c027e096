"""Rows to their experts and back: token t's row number j lies at position[t, j].

Each token's rows are found by their positions, so that nothing is added by two programs: no atomics
and one fixed order. Positions outside of the rows are skipped.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on


@triton.jit
def _spread_kernel(
    x_ptr,
    position_ptr,
    weights_ptr,
    rows_ptr,
    choices,
    places,
    cols,
    stride_x,
    BLOCK: tl.constexpr,
):
    # Program (t, c) owns column block c of token t and writes it to each of the token's rows.
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * stride_x + col, mask=col < cols, other=0.0).to(tl.float32)
    for choice in range(choices):
        place = tl.load(position_ptr + token * choices + choice)
        y = x
        if weights_ptr is not None:
            y = x * tl.load(weights_ptr + token * choices + choice).to(tl.float32)
        mask = (col < cols) & (place >= 0) & (place < places)
        tl.store(rows_ptr + place * cols + col, y.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    rows_ptr,
    position_ptr,
    weights_ptr,
    y_ptr,
    choices,
    places,
    cols,
    stride_rows,
    BLOCK: tl.constexpr,
):
    # Program (t, c) owns column block c of token t and adds up the token's rows in order.
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(choices):
        place = tl.load(position_ptr + token * choices + choice)
        mask = (col < cols) & (place >= 0) & (place < places)
        row = tl.load(rows_ptr + place * stride_rows + col, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            row *= tl.load(weights_ptr + token * choices + choice).to(tl.float32)
        total += row
    tl.store(y_ptr + token * cols + col, total.to(y_ptr.dtype.element_ty), mask=col < cols)


@triton.jit
def _weight_grad_kernel(
    dy_ptr,
    rows_ptr,
    position_ptr,
    dweights_ptr,
    choices,
    places,
    cols,
    stride_dy,
    stride_rows,
    BLOCK: tl.constexpr,
):
    # Program (t, j) owns the weight of one row: the product of that row and the token's gradient.
    token = tl.program_id(0).to(tl.int64)
    at = token * choices + tl.program_id(1)
    place = tl.load(position_ptr + at)
    inside = (place >= 0) & (place < places)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = (col < cols) & inside
        dy = tl.load(dy_ptr + token * stride_dy + col, mask=mask, other=0.0).to(tl.float32)
        row = tl.load(rows_ptr + place * stride_rows + col, mask=mask, other=0.0).to(tl.float32)
        total += dy * row
    tl.store(dweights_ptr + at, tl.sum(total, axis=0).to(dweights_ptr.dtype.element_ty))


def _rows(x):
    """`x` with contiguous rows, itself where they are."""
    return x if x.stride(1) == 1 else x.contiguous()


def _block(cols):
    return min(1024, max(32, triton.next_power_of_2(cols)))


def spread(x, position, weights):
    """rows [T * J, cols]: rows[position[t, j]] = x[t] * weights[t, j], weights None for ones."""
    (tokens, choices), cols = position.shape, x.shape[1]
    rows = torch.empty((tokens * choices, cols), dtype=x.dtype, device=x.device)
    if rows.numel():
        x, block = _rows(x), _block(cols)
        weights = None if weights is None else weights.contiguous()
        with on(x.device):
            _spread_kernel[(tokens, triton.cdiv(cols, block))](
                x, position.contiguous(), weights, rows, choices, tokens * choices, cols,
                x.stride(0), block, num_warps=4,
            )  # fmt: skip
    return rows


def combine(rows, position, weights):
    """y [T, cols]: y[t] = sum over j of rows[position[t, j]] * weights[t, j], None for ones."""
    (tokens, choices), cols = position.shape, rows.shape[1]
    y = torch.empty((tokens, cols), dtype=rows.dtype, device=rows.device)
    if y.numel():
        rows, block = _rows(rows), _block(cols)
        weights = None if weights is None else weights.contiguous()
        with on(rows.device):
            _combine_kernel[(tokens, triton.cdiv(cols, block))](
                rows, position.contiguous(), weights, y, choices, rows.shape[0], cols,
                rows.stride(0), block, num_warps=4,
            )  # fmt: skip
    return y


def weight_grad(dy, rows, position, dtype):
    """dweights [T, J]: dweights[t, j] = rows[position[t, j]] . dy[t]"""
    (tokens, choices), cols = position.shape, rows.shape[1]
    dweights = torch.empty((tokens, choices), dtype=dtype, device=rows.device)
    if dweights.numel():
        dy, rows = _rows(dy), _rows(rows)
        with on(rows.device):
            _weight_grad_kernel[(tokens, choices)](
                dy, rows, position.contiguous(), dweights, choices, rows.shape[0], cols,
                dy.stride(0), rows.stride(0), _block(cols), num_warps=4,
            )  # fmt: skip
    return dweights
