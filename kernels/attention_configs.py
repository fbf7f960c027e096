"""Block shapes of attention: those worth trying, and which to take untried (DESIGN.md, 4)."""

import torch
import triton
from fastllm.kernels.tiles import SHARED, capability


def config(block_m, block_n, warps, stages, tma=False, atomic=False):
    """A config: plain numbers, so that the tuner's tables can hold it."""
    return {
        "block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages, "tma": tma,
        "atomic": atomic,
    }  # fmt: skip


def forward_default(chip, dtype, width, t, extra):
    """The forward config to take untried; extra: scores are more than a product."""
    if dtype == torch.float32:
        return config(32, 32, 8, 1)
    if chip is None:
        return config(64, 32, 4, 1) if width > 128 else config(128, 64, 4, 1)
    if t <= 32:
        return config(16 if t <= 16 else 32, 64, 4, 2)
    if width > 128:
        return config(64, 32, 8 if extra or chip < (9, 0) else 4, 2)
    if chip >= (9, 0):
        if width <= 64 and not extra:
            return config(128, 128, 4 if chip < (10, 0) else 8, 3, tma=True)
        return config(128, 64, 8, 2 if extra else 3, tma=True)
    return config(128, 64, 4 if width <= 64 and not extra else 8, 3 if not extra else 2)


def backward_default(chip, dtype, width, extra):
    """The backward config to take untried: block_m queries, block_n keys of the dK/dV pass."""
    if dtype == torch.float32:
        return config(32, 32, 8, 1)
    if chip is None:
        return config(16, 64, 8, 1) if width > 128 else config(32, 64, 4, 1)
    if width > 128:
        return config(32, 32, 8, 1)
    if width <= 64:
        return config(64, 128, 8, 2) if chip >= (9, 0) and not extra else config(32, 128, 8, 2)
    if chip >= (10, 0):
        return config(64, 128, 8, 1)
    if extra:
        return config(16, 64, 8, 1) if chip >= (9, 0) else config(32, 32, 8, 1)
    return config(64, 64, 8, 1)


# queries, keys, warps, stages
_FORWARD = (
    (16, 64, 4, 2), (32, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 3), (64, 64, 4, 3),
    (64, 128, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3),
    (128, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 3),
)  # fmt: skip
_BACKWARD = (
    (16, 64, 8, 1), (32, 32, 8, 1), (32, 64, 4, 2), (32, 128, 8, 2), (64, 64, 4, 2), (64, 64, 8, 1),
    (64, 64, 8, 2), (64, 128, 8, 1), (64, 128, 8, 2), (128, 128, 8, 1),
)  # fmt: skip
_FULL = ((16, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (64, 32, 8, 1))


def forward_configs(chip, dtype, d, dv, t):
    """Every forward config worth trying on a chip: with and without TMA where it has that."""
    found = []
    for m, n, warps, stages in _FULL if dtype == torch.float32 else _FORWARD:
        if m > max(16, triton.next_power_of_2(t)):
            continue
        shared = (m * d + stages * n * (d + dv)) * dtype.itemsize
        tma = chip is not None and chip >= (9, 0) and dtype.itemsize == 2
        if _fits(chip, shared, m * max(d, dv, n), warps):
            found += [config(m, n, warps, stages, tma=use) for use in ((False, True)[: 1 + tma])]
    return found


def backward_configs(chip, dtype, d, dv):
    """Every backward config worth trying: dQ by a pass of its own, and by atomics."""
    found = []
    for m, n, warps, stages in _FULL if dtype == torch.float32 else _BACKWARD:
        shared = ((n + stages * m) * (d + dv) + 2 * m * n) * dtype.itemsize
        if _fits(chip, shared, n * (d + dv), warps):
            # float32 sums its rows again, in an order that atomics would not keep
            kinds = (False,) if dtype == torch.float32 else (False, True)
            found += [config(m, n, warps, stages, atomic=use) for use in kinds]
    return found


def _fits(chip, shared, sums, warps):
    """Whether buffers fit a chip's shared memory, and sums a thread's registers."""
    return shared <= SHARED.get(chip, 99 << 10) and sums // (32 * warps) <= 256


def more_than_products(x, options):
    """Whether a call needs registers for more than plain scores."""
    used = (x.mask, x.slopes, x.cu_q)
    return any(u is not None for u in used) or options.softcap > 0 or options.dropout


def forward_config(x, options):
    """The forward config of a Shape and its Options."""
    extra = more_than_products(x, options)
    return forward_default(capability(x.q.device), x.q.dtype, max(x.d, x.dv), x.t, extra)


def backward_config(x, options):
    """The backward config of a Shape and its Options."""
    extra = more_than_products(x, options)
    return backward_default(capability(x.q.device), x.q.dtype, max(x.d, x.dv), extra)
