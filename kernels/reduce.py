"""Reductions that several families share."""

import triton
import triton.language as tl


@triton.jit
def lane_moments(x, mask, step, mean, m2):
    """A step of Welford's mean and squared deviation in each lane: its value number `step`."""
    delta = tl.where(mask, x - mean, 0.0)
    mean += delta / step
    m2 += delta * tl.where(mask, x - mean, 0.0)
    return mean, m2


@triton.jit
def lane_counts(cols, BLOCK: tl.constexpr):
    """How many values each lane has seen after a loop over `cols` in steps of BLOCK, as fp32."""
    lane = tl.arange(0, BLOCK)
    return ((cols - lane + BLOCK - 1) // BLOCK).to(tl.float32)  # [BLOCK]


@triton.jit
def exact_mean(total, count):
    """total / count, and exactly so where a float32 is: the mean of equal values is that value.

    A GPU divides to within 2 ulp; tl.div_rn would call a subroutine, which costs registers.
    """
    n = tl.cast(count, tl.float32)
    mean = total / n
    return mean + tl.fma(-mean, n, total) / n


@triton.jit(do_not_specialize=["rows"])
def _sum_partials_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    rows,
    cols,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    # Program (c, s) owns column block c of sum s and adds up its rows, always in the same order.
    col = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    start = tl.program_id(1).to(tl.int64) * rows
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for block in range(0, rows, BLOCK_ROWS):
        row = block + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < cols)
        total += tl.load(partial_ptr + (start + row) * cols + col, mask=mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    if first_ptr is not None:  # noqa: SIM102 (None is known to the compiler, the other is not)
        if tl.program_id(1) == 0:
            tl.store(first_ptr + col, total.to(first_ptr.dtype.element_ty), mask=col < cols)
    if second_ptr is not None:  # noqa: SIM102
        if tl.program_id(1) == tl.num_programs(1) - 1:
            tl.store(second_ptr + col, total.to(second_ptr.dtype.element_ty), mask=col < cols)


def sum_partials(partial, first, second):
    """Adds up the rows of partial [sums, rows, cols] into `first`, `second` [cols], or either.

    The order is fixed by the shape alone, so the result is deterministic. `sums` counts the
    outputs that are not None; where it is 0, nothing is launched.
    """
    sums, rows, cols = partial.shape
    if sums:
        # few columns: narrow blocks, to have enough programs
        block_rows, block_cols = (64, 32) if cols <= 4096 else (16, 128)
        _sum_partials_kernel[(triton.cdiv(cols, block_cols), sums)](
            partial, first, second, rows, cols, block_rows, block_cols, num_warps=4
        )
