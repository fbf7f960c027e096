"""GroupNorm (Wu and He, 2018), forward and backward, on contiguous [N, C, S] input.

A group is `width` = C / groups channels of one sample, normalized together; weight and bias belong
to channels. A group that fits into registers is one program's work. A larger one takes two passes:
moments of each channel, then programs that combine their group's channels and write one tile each,
so that two samples of 32 groups still fill a GPU.

Backward, for n = (x - mean) * rstd and g = dy * weight:

    dx = rstd * (g - mean(g) - n * mean(g * n)),  dweight = sum of dy * n,  dbias = sum of dy

where the sums run over N and S. Their parts for each sample are written to [N, C] and added up in
a fixed order.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on
from fastllm.kernels.reduce import exact_mean, lane_counts, lane_moments, sum_partials

# Elements of a group, its sides rounded up to powers of two, that stay in registers.
MAX_FORWARD = 16384
MAX_BACKWARD = 8192


@triton.jit
def _channel(values_ptr, channel, inside):
    """One value a channel in fp32, as a column."""
    return tl.load(values_ptr + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _group_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, channels, width, spatial, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program owns one group of one sample and holds it in registers.
    groups = channels // width
    sample = tl.program_id(0).to(tl.int64) // groups
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    channel = tl.program_id(0) % groups * width + c
    mask = (c < width) & (s < spatial)
    at = (sample * channels + channel) * spatial + s  # [BLOCK_C, BLOCK_S]
    count = tl.cast(width * spatial, tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = exact_mean(tl.sum(tl.sum(x, axis=1), axis=0), count)
    x = tl.where(mask, x - mean, 0.0)
    y = x * tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / count + tl.cast(eps, tl.float32))
    if weight_ptr is not None:
        y *= _channel(weight_ptr, channel, c < width)
    if bias_ptr is not None:
        y += _channel(bias_ptr, channel, c < width)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dw_ptr, db_ptr, channels, width, spatial, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program owns one group of one sample n, and its channels in row n of the partial sums.
    groups = channels // width
    sample = tl.program_id(0).to(tl.int64) // groups
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    channel = tl.program_id(0) % groups * width + c
    mask = (c < width) & (s < spatial)
    first = sample * channels
    at = (first + channel) * spatial + s  # [BLOCK_C, BLOCK_S]
    count = tl.cast(width * spatial, tl.float32)
    n = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    mean = exact_mean(tl.sum(tl.sum(n, axis=1), axis=0), count)
    n = tl.where(mask, n - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(tl.sum(n * n, axis=1), axis=0) / count + tl.cast(eps, tl.float32))
    n *= rstd
    db = tl.sum(dy, axis=1, keep_dims=True)  # [BLOCK_C, 1]
    dw = tl.sum(dy * n, axis=1, keep_dims=True)
    if dw_ptr is not None:
        tl.store(dw_ptr + first + channel, dw, mask=c < width)
    if db_ptr is not None:
        tl.store(db_ptr + first + channel, db, mask=c < width)
    if dx_ptr is not None:
        if weight_ptr is not None:
            w = _channel(weight_ptr, channel, c < width)
            dy *= w
            dw *= w
            db *= w
        dx = dy - tl.sum(tl.sum(db, axis=1), axis=0) / count
        dx = (dx - n * (tl.sum(tl.sum(dw, axis=1), axis=0) / count)) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_moments_kernel(dy_ptr, x_ptr, moments_ptr, rows, spatial, BLOCK: tl.constexpr):
    # Each program owns one channel of one sample and writes to moments [4, N * C]: the mean of x,
    # the sum of (x - mean)^2 and, with dy, the sums of dy and of dy * (x - mean).
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    step = 0.0
    for start in range(0, spatial, BLOCK):
        mask = start + lane < spatial
        step += 1.0
        x = tl.load(x_ptr + row * spatial + start + lane, mask=mask, other=0.0).to(tl.float32)
        if dy_ptr is not None:
            dy = tl.load(dy_ptr + row * spatial + start + lane, mask=mask, other=0.0)
            dy = dy.to(tl.float32)
            delta = tl.where(mask, x - mean, 0.0)
            total += dy
            cross += delta * tl.where(mask, dy - total / step, 0.0)
        mean, m2 = lane_moments(x, mask, step, mean, m2)
    count = lane_counts(spatial, BLOCK)
    center = exact_mean(tl.sum(mean * count, axis=0), spatial)
    m2 += count * (mean - center) * (mean - center)
    tl.store(moments_ptr + row, center)
    tl.store(moments_ptr + rows + row, tl.sum(m2, axis=0))
    if dy_ptr is not None:
        dy_sum = tl.sum(total, axis=0)
        cross += (mean - center) * (total - count * (dy_sum / spatial))
        tl.store(moments_ptr + 2 * rows + row, dy_sum)
        tl.store(moments_ptr + 3 * rows + row, tl.sum(cross, axis=0))


@triton.jit
def _group_moments(moments_ptr, rows, first, width, spatial, eps, BLOCK_C: tl.constexpr):
    """Mean and rstd of the group whose channels start at row `first` of the moments."""
    c = tl.arange(0, BLOCK_C)
    mean = tl.load(moments_ptr + first + c, mask=c < width, other=0.0)
    m2 = tl.load(moments_ptr + rows + first + c, mask=c < width, other=0.0)
    center = exact_mean(tl.sum(mean, axis=0), width)
    apart = tl.where(c < width, mean - center, 0.0)
    square = tl.sum(m2, axis=0) / width / spatial + tl.sum(apart * apart, axis=0) / width
    return center, tl.rsqrt(square + tl.cast(eps, tl.float32))


@triton.jit
def _group_norm_fwd_tile_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, moments_ptr, rows, channels, width, spatial, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program owns one block of one channel of one sample; row counts all N * C channels.
    blocks = tl.cdiv(spatial, BLOCK_S)
    row = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    channel = row % channels
    mean, rstd = _group_moments(
        moments_ptr, rows, row - channel % width, width, spatial, eps, BLOCK_C
    )
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel).to(tl.float32)
    shift = 0.0
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + channel).to(tl.float32)
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    x = tl.load(x_ptr + row * spatial + s, mask=s < spatial, other=0.0).to(tl.float32)
    y = (x - mean) * scale + shift
    tl.store(y_ptr + row * spatial + s, y.to(y_ptr.dtype.element_ty), mask=s < spatial)


@triton.jit
def _group_norm_bwd_tile_kernel(
    dy_ptr, x_ptr, weight_ptr, dx_ptr, dw_ptr, moments_ptr, rows, channels, width, spatial, eps,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # Each program owns one block of one channel of one sample; row counts all N * C channels.
    # Block 0 also writes the channel's part of dweight.
    blocks = tl.cdiv(spatial, BLOCK_S)
    row = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    channel = row % channels
    first = row - channel % width
    mean, rstd = _group_moments(moments_ptr, rows, first, width, spatial, eps, BLOCK_C)
    c = tl.arange(0, BLOCK_C)
    inside = c < width
    # the sums of dy * n of the group's channels: cross is about the channel's own mean
    dy_sum = tl.load(moments_ptr + 2 * rows + first + c, mask=inside, other=0.0)
    dy_n = tl.load(moments_ptr + 3 * rows + first + c, mask=inside, other=0.0)
    apart = tl.load(moments_ptr + first + c, mask=inside, other=0.0) - mean
    dy_n = (dy_n + dy_sum * apart) * rstd
    if dw_ptr is not None:  # noqa: SIM102 (None is known to the compiler, the other is not)
        if block == 0:
            tl.store(dw_ptr + first + c, dy_n, mask=inside & (first + c == row))
    if dx_ptr is not None:
        scale = 1.0
        if weight_ptr is not None:
            w = tl.load(weight_ptr + channel - channel % width + c, mask=inside, other=0.0)
            dy_sum *= w.to(tl.float32)
            dy_n *= w.to(tl.float32)
            scale = tl.load(weight_ptr + channel).to(tl.float32)
        mean_g = tl.sum(dy_sum, axis=0) / width / spatial
        along = tl.sum(dy_n, axis=0) / width / spatial
        s = block * BLOCK_S + tl.arange(0, BLOCK_S)
        at = row * spatial + s
        n = (tl.load(x_ptr + at, mask=s < spatial, other=0.0).to(tl.float32) - mean) * rstd
        g = tl.load(dy_ptr + at, mask=s < spatial, other=0.0).to(tl.float32) * scale
        dx = (g - mean_g - n * along) * rstd
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=s < spatial)


def _shape(x, groups):
    batch, channels = x.shape[:2]
    spatial = x.numel() // (batch * channels)
    width = channels // groups
    return batch, channels, width, spatial, triton.next_power_of_2(width)


def _moments(dy, x, rows, spatial):
    """Moments of each channel, and the grid and block of the tiles that need them."""
    moments = torch.empty((2 if dy is None else 4, rows), dtype=torch.float32, device=x.device)
    block = min(2048, max(128, triton.next_power_of_2(spatial)))
    warps = max(1, block // 512)
    _channel_moments_kernel[(rows,)](dy, x, moments, rows, spatial, block, num_warps=warps)
    return moments, (rows * triton.cdiv(spatial, block),), block, warps


def group_norm_fwd(x, groups, weight, bias, eps):
    """y for contiguous x [N, C, *]; weight and bias [C] may be None."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    batch, channels, width, spatial, block_c = _shape(x, groups)
    block_s = triton.next_power_of_2(spatial)
    with on(x.device):
        if block_c * block_s <= MAX_FORWARD:
            _group_norm_fwd_kernel[(batch * groups,)](
                x, weight, bias, y, channels, width, spatial, eps, block_c, block_s,
                num_warps=max(1, min(16, block_c * block_s // 1024)),
            )  # fmt: skip
        else:
            rows = batch * channels
            moments, grid, block, warps = _moments(None, x, rows, spatial)
            _group_norm_fwd_tile_kernel[grid](
                x, weight, bias, y, moments, rows, channels, width, spatial, eps, block_c, block,
                num_warps=warps,
            )  # fmt: skip
    return y


def group_norm_bwd(dy, x, groups, weight, bias, eps, needs):
    """(dx, dweight, dbias) for contiguous dy and x [N, C, *], each None where not needed."""
    dx = torch.empty_like(x) if needs[0] else None
    dw = torch.empty_like(weight) if needs[1] and weight is not None else None
    db = torch.empty_like(bias) if needs[2] and bias is not None else None
    if x.numel() == 0:
        return dx, *(None if d is None else d.zero_() for d in (dw, db))
    batch, channels, width, spatial, block_c = _shape(x, groups)
    block_s = triton.next_power_of_2(spatial)
    with on(x.device):
        if block_c * block_s <= MAX_BACKWARD:
            sums = (dw is not None) + (db is not None)
            partial = torch.empty((sums, batch, channels), dtype=torch.float32, device=x.device)
            _group_norm_bwd_kernel[(batch * groups,)](
                dy, x, weight, dx, None if dw is None else partial[0],
                None if db is None else partial[-1], channels, width, spatial, eps,
                block_c, block_s, num_warps=max(1, min(16, block_c * block_s // 512)),
            )  # fmt: skip
            sum_partials(partial, dw, db)
        else:
            rows = batch * channels
            moments, grid, block, warps = _moments(dy, x, rows, spatial)
            dw_sums = None if dw is None else torch.empty_like(moments[:1])
            _group_norm_bwd_tile_kernel[grid](
                dy, x, weight, dx, dw_sums, moments, rows, channels, width, spatial, eps,
                block_c, block, num_warps=warps,
            )  # fmt: skip
            if dw is not None:
                sum_partials(dw_sums.view(1, batch, channels), dw, None)
            if db is not None:
                sum_partials(moments[2].view(1, batch, channels), None, db)
    return dx, dw, db
