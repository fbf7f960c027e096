"""SmoothQuant: what makes activations hard to quantize is moved into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models" (2022).
"""

import torch
from torch import Tensor

from fastllm.quant.awq import balanced
from fastllm.quant.calibrate import Stats


def smooth(weight: Tensor, stats: Stats, alpha: float) -> Tensor:
    """Scales [K] that weights are multiplied, and inputs divided with."""
    widest = weight.float().abs().amax(0)
    scales = stats.largest.pow(alpha) / widest.pow(1 - alpha)
    return balanced(torch.where((widest > 0) & (stats.largest > 0), scales, 0.0))
