"""AWQ: channels that matter are scaled up before they are rounded.

Lin, Tang, Tang, Yang, Dang, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression
and Acceleration" (2023). The scale of a channel is its mean magnitude to a power; the power is
searched for on the caller's data.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastllm.quant.calibrate import Stats, energy

POWERS = tuple(i / 10 for i in range(11))


def awq(weight: Tensor, stats: Stats, rounded: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Scales [K] that weights are multiplied, and inputs divided with; None: none helps.

    rounded: a weight -> what is left of it in the format.
    """
    weight = weight.float()
    mean = stats.mean
    best, least = None, energy(rounded(weight).float() - weight, stats.gram)
    for power in POWERS[1:]:
        scales = balanced(mean.pow(power))
        error = energy(rounded(weight * scales).float() / scales - weight, stats.gram)
        if error < least:
            best, least = scales, error
    return best


def balanced(scales: Tensor) -> Tensor:
    """Around 1; channels without any input keep 1."""
    alive = scales > 0
    if not bool(alive.any()):
        return torch.ones_like(scales)
    known = scales[alive]
    scales = torch.where(alive, scales / (known.amax() * known.amin()).sqrt(), 1.0)
    return scales.clamp(1e-4, 1e4)
