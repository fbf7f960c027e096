"""Stock PyTorch: its own grouped product where it takes the call, else a loop over the experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.grouped.spec import fake, segments


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    if offsets.is_meta:
        return fake(input, weights)
    parts, end = [], 0
    pairs = segments(offsets, input.shape[0])
    if bias is None and _takes(input, weights):
        end = pairs[-1][1]
        parts.append(F.grouped_mm(input[:end], weights.mT, offs=offsets))
    else:
        for expert, (start, end) in enumerate(pairs):
            b = None if bias is None else bias[expert]
            parts.append(F.linear(input[start:end], weights[expert], b))
    kind = parts[0].dtype if parts else input.dtype  # autocast's, where it is on
    parts.append(input.new_zeros(input.shape[0] - end, weights.shape[1], dtype=kind))
    return torch.cat(parts)


def _takes(input: Tensor, weights: Tensor) -> bool:
    """Whether F.grouped_mm does: dense rows of a multiple of 16 bytes."""
    if not hasattr(F, "grouped_mm") or not input.is_cpu or not weights.numel():
        return False
    dense = input.is_contiguous() and (weights.is_contiguous() or weights.mT.is_contiguous())
    aligned = all(n * input.element_size() % 16 == 0 for n in weights.shape[1:])
    return dense and aligned and input.dtype != torch.float64


BACKEND: Backend = Backend("torch", grouped_linear)
