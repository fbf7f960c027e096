"""Block shapes of the matrix products: those worth trying, and which to take untried."""

import torch
import triton
from fastllm.kernels.tiles import Config, fits

_HALF = (
    Config(16, 64, 128, 4, 4),
    Config(16, 128, 128, 4, 3),
    Config(32, 64, 128, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(64, 128, 64, 4, 4),
    Config(128, 64, 64, 4, 4),
    Config(128, 128, 32, 4, 4),
    Config(128, 128, 64, 8, 3),
    Config(128, 256, 32, 8, 3),
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 3, persistent=True),
    Config(64, 128, 64, 4, 4, tma=True),
    Config(128, 128, 64, 8, 4, tma=True),
    Config(128, 256, 64, 8, 3, tma=True),
    Config(128, 128, 64, 8, 3, persistent=True, tma=True),
    Config(128, 256, 64, 8, 3, persistent=True, tma=True),
    Config(128, 128, 64, 4, 4, tma=True, specialize=True),
    Config(128, 256, 64, 4, 3, tma=True, specialize=True),
    Config(64, 64, 32, 4, 2),
    Config(128, 128, 32, 8, 2),
)
_FULL = (
    Config(16, 32, 32, 2, 3),
    Config(32, 32, 32, 4, 3),
    Config(64, 32, 32, 4, 3),
    Config(64, 64, 16, 4, 3),
    Config(128, 64, 16, 8, 3),
    Config(128, 128, 16, 8, 3),
    Config(64, 64, 32, 4, 3),
    Config(128, 128, 32, 8, 3),
    Config(64, 64, 16, 4, 2),
)
# K is split where M and N alone give too few tiles
_SPLITS = (2, 4, 8, 16)


def configs(dtype, capability, products=1):
    """Every config worth trying on a chip; the tuner times them."""
    plain = _FULL if dtype == torch.float32 else _HALF
    return [c for c in plain if fits(c, capability, dtype, products)]


def default_config(m, n, k, dtype, capability, sms, *, tf32=False, products=1, lanes=128):
    """The config to take untried: the largest block that still gives every multiprocessor a tile.

    m, n, k: the product's sizes; capability: (major, minor), None for AMD; sms: multiprocessors;
    products: 2 for a gated pair; lanes: accumulators that one thread may hold.
    """
    known = _candidates(dtype, capability, tf32)
    found = [c for c in known if c.lane_values(products) <= lanes]
    found = [c for c in found if fits(c, capability, dtype, products)]
    # blocks much taller than M waste their rows
    low = [c for c in found if c.block_m <= max(16, triton.next_power_of_2(m))] or found[-1:]
    for config in low:
        if _tiles(config, m, n) >= sms:
            return config
    small = low[-1]
    return _split(small, m, n, k, sms) if products == 1 else small


def _tiles(config, m, n):
    return triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)


def _candidates(dtype, capability, tf32):
    """From large to small; the last is for a few rows."""
    if dtype == torch.float32:
        large = (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3))
        if not tf32:
            blackwell = capability is not None and capability >= (10, 0)
            large = (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 4, 3))
            large = (Config(128, 128, 16, 8, 3),) if blackwell else large
        small = (Config(64, 64, 16, 4, 2), Config(32, 32, 32, 4, 3), Config(16, 32, 32, 2, 3))
        return (*large, *small)
    small = (Config(64, 64, 64, 4, 4), Config(32, 64, 64, 4, 4), Config(16, 64, 64, 4, 4))
    if capability is None:  # 64 KB a workgroup, and a stage less than on NVIDIA's
        small = (Config(64, 64, 64, 4, 2), Config(32, 64, 64, 4, 2), Config(16, 64, 64, 4, 2))
        return (Config(128, 128, 32, 8, 2), *small)
    if capability >= (9, 0):
        large = (
            Config(128, 256, 64, 8, 3, tma=True),
            Config(128, 128, 64, 8, 4, tma=True),
            Config(64, 128, 64, 4, 4, tma=True),
        )
        return (*large, *small)
    return (
        Config(128, 256, 32, 8, 3),
        Config(128, 128, 32, 4, 4),
        Config(128, 128, 32, 8, 3),
        Config(64, 128, 32, 4, 3),
        *small,
    )


def _split(config, m, n, k, sms):
    """`config` with K split until every multiprocessor has work, by four blocks or more."""
    wanted = sms // _tiles(config, m, n)
    most = k // (4 * config.block_k)
    split = max((s for s in _SPLITS if s <= wanted and s <= most), default=1)
    return Config(
        config.block_m, config.block_n, config.block_k, config.warps, config.stages, split_k=split
    )
