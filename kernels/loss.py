"""Cross entropy and divergences over rows of logits; forward and backward.

Logits are s = softcap * tanh(scale * x / softcap), or scale * x where softcap is 0; all in fp32.
Forward reads a row once, keeping a running maximum and a sum in each lane (Milakov and Gimelshein,
2018); backward computes e^(s - lse) again from the saved log-sum-exp, which is kept in two fp32
parts (its value as fp64), since one is too coarse where logits are large.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -t, t)
    y = x * x  # near 0, 1 - e would lose digits
    series = -0.33333334 + y * (
        0.13333334 + y * (-0.05396825 + y * (0.021869488 - y * 0.008863236))
    )
    return tl.where(tl.abs(x) < 0.3, x + x * y * series, far)


@triton.jit
def _logits(x, scale, cap, CAPPED: tl.constexpr):
    s = x.to(tl.float32) * scale
    if CAPPED:
        s = cap * _tanh(s / cap)
    return s


@triton.jit
def _slope(x, scale, cap, CAPPED: tl.constexpr):
    """The derivative of _logits: scale * (1 - tanh^2), exact where tanh is 1."""
    d = scale + tl.zeros_like(x.to(tl.float32))
    if CAPPED:
        y = x.to(tl.float32) * scale / cap
        e, t = tl.exp(-2.0 * tl.abs(y)), _tanh(y)
        d = scale * tl.where(tl.abs(t) < 0.5, 1.0 - t * t, 4.0 * e / ((1.0 + e) * (1.0 + e)))
    return d


@triton.jit
def _row_lse(x_ptr, base, cols, scale, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """(largest, sum of e^(s - largest)) of a row, read once."""
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lane
        x = tl.load(x_ptr + base + col, mask=col < cols, other=0.0)
        s = tl.where(col < cols, _logits(x, scale, cap, CAPPED), float("-inf"))
        new = tl.maximum(top, s)
        # a lane of -inf so far must not make NaN of -inf - -inf
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(tl.where(top == float("-inf"), safe, top) - safe) + tl.exp(s - safe)
        top = new
    largest = tl.max(top, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    lanes = total * tl.exp(tl.where(top == float("-inf"), largest, top) - largest)
    return largest, tl.sum(lanes, axis=0)


@triton.jit
def _soft(probs_ptr, weight_ptr, base, first, col, mask, keep, spread):
    """weight * (keep * probability + spread): a row's soft targets, without the index's own."""
    soft = tl.where(mask, spread + tl.zeros(col.shape, tl.float32), 0.0)
    if probs_ptr is not None:
        soft += keep * tl.load(probs_ptr + base + col, mask=mask, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        soft *= tl.load(weight_ptr + first + col, mask=mask, other=0.0).to(tl.float32)
    return soft


@triton.jit
def _class_weight(weight_ptr, index):
    w = 1.0
    if weight_ptr is not None:
        w = tl.load(weight_ptr + index).to(tl.float32)
    return w


@triton.jit(do_not_specialize=["ignore"])
def _cross_entropy_fwd_kernel(
    x_ptr,
    target_ptr,
    probs_ptr,
    weight_ptr,
    loss_ptr,
    share_ptr,
    lse_ptr,
    cols,
    first,
    classes,
    ignore,
    smoothing,
    z_loss,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Each program owns one row: its loss, its share of a mean's divisor, its log-sum-exp. A part of
    # a row gives minus the sum of soft target * logit instead of a loss.
    row = tl.program_id(0).to(tl.int64)
    base = row * cols
    smoothing = tl.cast(smoothing, tl.float32)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    largest, total = _row_lse(x_ptr, base, cols, scale, cap, CAPPED, BLOCK)
    log_sum = tl.log(total)
    lse = largest.to(tl.float64) + log_sum.to(tl.float64)
    if PART:
        largest, log_sum = 0.0, 0.0
    loss = 0.0
    share = 1.0
    kept = True
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        kept = target != ignore
        inside = (target >= 0) & (target < classes)
        share = _class_weight(weight_ptr, tl.where(inside, target, 0))
        here = (target >= first) & (target < first + cols)
        own = tl.load(x_ptr + base + tl.where(here, target - first, 0))
        loss = (1.0 - smoothing) * share * (log_sum - (_logits(own, scale, cap, CAPPED) - largest))
        loss = tl.where(here, loss, tl.where(inside | (target == ignore), 0.0, float("nan")))
    if SMOOTH:
        dot = tl.zeros([BLOCK], tl.float32)
        for start in range(0, cols, BLOCK):
            col = start + tl.arange(0, BLOCK)
            mask = col < cols
            x = tl.load(x_ptr + base + col, mask=mask, other=0.0)
            log_p = (_logits(x, scale, cap, CAPPED) - largest) - log_sum
            spread = smoothing / classes
            soft = _soft(probs_ptr, weight_ptr, base, first, col, mask, 1.0 - smoothing, spread)
            dot += tl.where(mask, soft * log_p, 0.0)
        loss -= tl.sum(dot, axis=0)
    z = tl.cast(z_loss, tl.float32)
    whole = lse.to(tl.float32)
    if not PART:
        loss += tl.where(z != 0.0, z * whole * whole, 0.0)
    tl.store(loss_ptr + row, tl.where(kept, loss, 0.0))
    tl.store(share_ptr + row, tl.where(kept, share, 0.0))
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["ignore"])
def _cross_entropy_bwd_kernel(
    x_ptr,
    target_ptr,
    probs_ptr,
    weight_ptr,
    mass_ptr,
    lse_ptr,
    g_ptr,
    dx_ptr,
    dprobs_ptr,
    cols,
    first,
    classes,
    ignore,
    smoothing,
    z_loss,
    scale,
    cap,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Program (r, c) owns column block c of row r; dx may be x: each element is read once.
    row = tl.program_id(0).to(tl.int64)
    base = row * cols
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    smoothing = tl.cast(smoothing, tl.float32)
    scale, cap = tl.cast(scale, tl.float32), tl.cast(cap, tl.float32)
    lse = tl.load(lse_ptr + row)
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    g = tl.load(g_ptr + row)
    x = tl.load(x_ptr + base + col, mask=mask, other=0.0)
    log_p = (_logits(x, scale, cap, CAPPED) - high) - low
    p = tl.exp(log_p)
    mass = 0.0
    if mass_ptr is not None:  # the sum of the soft targets
        mass += tl.load(mass_ptr + (row if target_ptr is None else 0)).to(tl.float32)
    z = 2.0 * tl.cast(z_loss, tl.float32) * tl.where(z_loss != 0.0, high, 0.0)
    kept = True
    soft = tl.zeros([BLOCK], tl.float32)
    if SMOOTH:
        spread = smoothing / classes
        soft = _soft(probs_ptr, weight_ptr, base, first, col, mask, 1.0 - smoothing, spread)
    if target_ptr is not None:
        target = tl.load(target_ptr + row)
        kept = target != ignore
        inside = (target >= 0) & (target < classes)
        hard = (1.0 - smoothing) * _class_weight(weight_ptr, tl.where(inside, target, 0))
        mass += hard
        g = tl.where(inside | (target == ignore), g, float("nan"))
    # p near 1 without the cancellation of p - 1
    small = log_p * (1.0 + log_p * (0.5 + log_p * (0.16666667 + log_p * 0.041666667)))
    less = tl.where(log_p > -0.05, small, p - 1.0)
    d = (mass + z) * p - soft
    if target_ptr is not None:
        d = tl.where(col + first == target, mass * less + (mass - hard - soft) + z * p, d)
    else:
        d = tl.where(log_p > -0.05, mass * less + (mass - soft) + z * p, d)
    if dx_ptr is not None:
        d = d * g * _slope(x, scale, cap, CAPPED)
        tl.store(dx_ptr + base + col, tl.where(kept, d, 0.0).to(dx_ptr.dtype.element_ty), mask=mask)
    if dprobs_ptr is not None:
        d = -g * (1.0 - smoothing) * log_p
        if weight_ptr is not None:
            d *= tl.load(weight_ptr + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dprobs_ptr + base + col, d.to(dprobs_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pair(s_ptr, t_ptr, at, mask, scale, s_top, s_log, t_top, t_log):
    """(p, log p, q, log q) of student and teacher; 0 and -inf past the end."""
    s = tl.load(s_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    log_p = tl.where(mask, (s - s_top) - s_log, float("-inf"))
    log_q = tl.where(mask, (t - t_top) - t_log, float("-inf"))
    return tl.exp(log_p), log_p, tl.exp(log_q), log_q


@triton.jit
def _times(p, log_ratio):
    return tl.where(p > 0, p * log_ratio, 0.0)


@triton.jit
def _mixture(log_p, log_q):
    """log((p + q) / 2)"""
    top = tl.maximum(log_p, log_q)
    return top + tl.log(1.0 + tl.exp(tl.minimum(log_p, log_q) - top)) - LOG_2


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def _distill_fwd_kernel(
    s_ptr, t_ptr, loss_ptr, stats_ptr, cols, scale, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    # Each program owns one row, read twice: the second time out of the L2 cache.
    row = tl.program_id(0).to(tl.int64)
    base = row * cols
    scale = tl.cast(scale, tl.float32)
    s_top, s_sum = _row_lse(s_ptr, base, cols, scale, 0.0, False, BLOCK)
    t_top, t_sum = _row_lse(t_ptr, base, cols, scale, 0.0, False, BLOCK)
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    loss = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        p, log_p, q, log_q = _pair(
            s_ptr, t_ptr, base + col, col < cols, scale, s_top, s_log, t_top, t_log
        )
        if KIND == "forward_kl":
            loss += _times(q, log_q - log_p)
        elif KIND == "reverse_kl":
            loss += _times(p, log_p - log_q)
        elif KIND == "jsd":
            m = _mixture(log_p, log_q)
            own = _times(p, log_p - m)
            loss += 0.5 * (_times(q, log_q - m) + own)
            mean += own
        else:
            loss += 0.5 * tl.abs(p - q)
            mean += p * _sign(p - q)
    if KIND == "reverse_kl":
        mean = loss
    tl.store(loss_ptr + row, tl.sum(loss, axis=0))
    tl.store(stats_ptr + 3 * row, s_top.to(tl.float64) + s_log.to(tl.float64))
    tl.store(stats_ptr + 3 * row + 1, t_top.to(tl.float64) + t_log.to(tl.float64))
    tl.store(stats_ptr + 3 * row + 2, tl.sum(mean, axis=0).to(tl.float64))


@triton.jit
def _split(value):
    high = value.to(tl.float32)
    return high, (value - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _distill_bwd_kernel(
    s_ptr, t_ptr, stats_ptr, g_ptr, ds_ptr, cols, scale, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    # Program (r, c) owns column block c of row r.
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = col < cols
    at = row * cols + col
    scale = tl.cast(scale, tl.float32)
    s_top, s_log = _split(tl.load(stats_ptr + 3 * row))
    t_top, t_log = _split(tl.load(stats_ptr + 3 * row + 1))
    mean = tl.load(stats_ptr + 3 * row + 2).to(tl.float32)
    g = tl.load(g_ptr + row) * scale
    p, log_p, q, log_q = _pair(s_ptr, t_ptr, at, mask, scale, s_top, s_log, t_top, t_log)
    if KIND == "forward_kl":
        d = p - q
    elif KIND == "reverse_kl":
        d = _times(p, (log_p - log_q) - mean)
    elif KIND == "jsd":
        d = 0.5 * _times(p, (log_p - _mixture(log_p, log_q)) - mean)
    else:
        d = 0.5 * p * (_sign(p - q) - mean)
    tl.store(ds_ptr + at, (d * g).to(ds_ptr.dtype.element_ty), mask=mask)


def _block(cols, most):
    """(BLOCK, num_warps) of a row's steps: 16 values a lane where the row is long."""
    block = min(most, max(128, triton.next_power_of_2(cols)))
    return block, max(1, min(8, block // 512))


def _targets(target):
    """(indices or None, probabilities or None)"""
    return (None, target) if target.is_floating_point() else (target, None)


def cross_entropy_fwd(x, target, weight, ignore, smoothing, z_loss, cap, scale, part=None):
    """(losses, shares of a mean's divisor, both fp32, lse fp64) of contiguous x [rows, cols].

    target holds indices, or probabilities where its dtype is floating; weight may be None. With
    part = (first, classes), x has the columns from `first` on of longer rows: see the kernel.
    """
    rows, cols = x.shape
    first, classes = part or (0, cols)
    index, probs = _targets(target)
    losses, shares = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    lse = torch.empty((rows,), dtype=torch.float64, device=x.device)
    block, warps = _block(cols, 4096)
    if rows:
        with on(x.device):
            _cross_entropy_fwd_kernel[(rows,)](
                x, index, probs, weight, losses, shares, lse, cols, first, classes, ignore,
                smoothing, z_loss, scale, cap, cap != 0.0, probs is not None or smoothing != 0.0,
                part is not None, block, num_warps=warps,
            )  # fmt: skip
    return losses, shares, lse


def cross_entropy_bwd(
    x, target, weight, lse, g, dx, dprobs, ignore, smoothing, z_loss, cap, scale, part=None
):
    """Fills dx and dprobs, either of them None, from the upstream gradient g [rows] in fp32.

    With `part`, as in cross_entropy_fwd, lse is that of the whole rows.
    """
    rows, cols = x.shape
    if not rows:
        return
    first, classes = part or (0, cols)
    index, probs = _targets(target)
    mass = None
    if probs is not None:
        soft = (1.0 - smoothing) * probs.to(torch.float32) + smoothing / cols
        soft = soft if weight is None else soft * weight.to(torch.float32)
        mass = soft.sum(-1, dtype=torch.float64)
    elif smoothing:
        total = torch.full((), float(classes)) if weight is None else weight.to(torch.float32).sum()
        mass = (total.to(x.device) * (smoothing / classes)).reshape(1)
    block, warps = _block(cols, 2048)
    with on(x.device):
        _cross_entropy_bwd_kernel[(rows, triton.cdiv(cols, block))](
            x, index, probs, weight, mass, lse, g, dx, dprobs, cols, first, classes, ignore,
            smoothing, z_loss, scale, cap, cap != 0.0, probs is not None or smoothing != 0.0, block,
            num_warps=warps,
        )  # fmt: skip


def distill_fwd(student, teacher, kind, temperature):
    """(losses fp32 [rows], stats fp64 [rows, 3]) of contiguous logits [rows, cols]."""
    rows, cols = student.shape
    loss = torch.empty((rows,), dtype=torch.float32, device=student.device)
    stats = torch.empty((rows, 3), dtype=torch.float64, device=student.device)
    block, warps = _block(cols, 2048)
    if rows:
        with on(student.device):
            _distill_fwd_kernel[(rows,)](
                student, teacher, loss, stats, cols, 1.0 / temperature, kind, block, num_warps=warps
            )
    return loss, stats


def distill_bwd(student, teacher, stats, g, kind, temperature, out=None):
    """The gradient of the student's logits, from the upstream gradient g [rows] in fp32.

    `out` may be student or teacher: each element is read before it is written.
    """
    rows, cols = student.shape
    ds = torch.empty_like(student) if out is None else out
    block, warps = _block(cols, 2048)
    if rows:
        with on(student.device):
            _distill_bwd_kernel[(rows, triton.cdiv(cols, block))](
                student, teacher, stats, g, ds, cols, 1.0 / temperature, kind, block,
                num_warps=warps,
            )  # fmt: skip
    return ds
