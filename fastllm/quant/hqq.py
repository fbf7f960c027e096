"""HQQ: zero points that suit the bulk of a group, found without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): minimizes
|W - dequantized|^p, p < 1, over the zero points. An auxiliary error E takes up the outliers (its
proximal step shrinks), and the zero points are means in closed form; both in turns.
"""

import torch
from torch import Tensor

from fastllm.quant.formats import Format
from fastllm.quant.grid import by_groups, encoded, scales_of
from fastllm.quant.qtensor import QTensor

STEPS, POWER, BETA, GROWTH = 20, 0.7, 10.0, 1.01


def hqq(weight: Tensor, format: Format) -> QTensor:
    """weight [N, K] in an asymmetric int4 format, with fractional zero points."""
    scales, zeros = scales_of(weight, format)
    w, s, z, real = _grouped(weight, format, scales, zeros)
    unit = torch.where(s == 0, 1.0, s)
    # the paper's beta is for weights of usual size: errors are measured in units of the scale
    best, least = z, _distance(w, unit, z, real)
    beta = BETA
    for _ in range(STEPS):
        q = (w / unit + z).round().clamp(0, 15)
        error = w / unit - (q - z)
        magnitude = error.abs()
        shrunk = (magnitude - magnitude.clamp(min=1e-6).pow(POWER - 1) / beta).clamp(min=0)
        moved = q - (w / unit - error.sign() * shrunk)
        z = (moved * real).sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        now = _distance(w, unit, z, real)
        best, least = torch.where(now < least, z, best), torch.minimum(now, least)
        beta *= GROWTH
    return encoded(weight, format, scales, best.reshape(zeros.shape).to(zeros.dtype))


def _grouped(
    weight: Tensor, format: Format, scales: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights [N, groups, group], scales and zeros [N, groups, 1], and which weights are real."""
    group = format.group or weight.shape[-1]
    w = by_groups(weight.float(), group)
    real = by_groups(torch.ones_like(weight[:1], dtype=torch.float32), group)
    return w, scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1), real


def _distance(w: Tensor, unit: Tensor, z: Tensor, real: Tensor) -> Tensor:
    """|error|^p of each group, with zero points as they are stored: [N, groups, 1]."""
    z = z.bfloat16().float()
    q = (w / unit + z).round().clamp(0, 15)
    return ((w / unit - (q - z)).abs().pow(POWER) * real).sum(-1, keepdim=True)
