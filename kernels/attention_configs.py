"""Block shapes of attention: those worth trying, and which to take untried (DESIGN.md, 4)."""

import torch
from fastllm.kernels.tiles import capability


def config(block_m, block_n, warps, stages, tma=False, specialize=False, atomic=False):
    """A config: plain numbers, so that the tuner's tables can hold it."""
    return {
        "block_m": block_m, "block_n": block_n, "warps": warps, "stages": stages, "tma": tma,
        "specialize": specialize, "atomic": atomic,
    }  # fmt: skip


def forward_default(chip, dtype, width, t, extra):
    """The forward config to take untried; extra: scores are more than a product."""
    if dtype == torch.float32:
        return config(32, 32, 4, 2) if width > 128 else config(64, 32, 4, 2)
    if chip is None:
        return config(64, 32, 4, 1) if width > 128 else config(128, 64, 4, 1)
    if t <= 32:
        return config(16 if t <= 16 else 32, 64, 4, 2)
    if width > 128:
        return config(64, 32, 4, 2)
    if chip >= (9, 0):
        if width <= 64:
            return config(128, 64 if extra else 128, 4 if not extra else 8, 3, tma=True)
        return config(128, 64, 8, 3 if not extra else 2, tma=True)
    return config(128, 64, 4 if width <= 64 and not extra else 8, 3 if not extra else 2)


def backward_default(chip, dtype, width, extra):
    """The backward config to take untried: block_m queries, block_n keys of the dK/dV pass."""
    if dtype == torch.float32:
        return config(16, 32, 4, 1) if width > 128 else config(32, 32, 4, 1)
    if width > 128:
        return config(16, 64, 8, 1)
    if chip is None:
        return config(32, 64, 4, 1)
    if width <= 64:
        return config(64, 128, 8, 2) if chip == (9, 0) and not extra else config(32, 128, 8, 2)
    if chip >= (10, 0):
        return config(64, 128, 8, 1)
    return config(32 if extra else 64, 64, 8, 1)


def forward_config(x, options):
    """The forward config of a Shape and its Options."""
    extra = x.mask is not None or x.slopes is not None or options.softcap > 0 or options.dropout
    return forward_default(capability(x.q.device), x.q.dtype, max(x.d, x.dv), x.t, extra)


def backward_config(x, options):
    """The backward config of a Shape and its Options."""
    extra = x.mask is not None or x.slopes is not None or options.softcap > 0 or options.dropout
    return backward_default(capability(x.q.device), x.q.dtype, max(x.d, x.dv), extra)
