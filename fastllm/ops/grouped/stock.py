"""Stock PyTorch: a loop over the experts, as models without a grouped product write it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.grouped.spec import fake, segments


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    if offsets.is_meta:
        return fake(input, weights)
    parts, end = [], 0
    for expert, (start, end) in enumerate(segments(offsets, input.shape[0])):
        b = None if bias is None else bias[expert]
        parts.append(F.linear(input[start:end], weights[expert], b))
    kind = parts[0].dtype if parts else input.dtype  # autocast's, where it is on
    parts.append(input.new_zeros(input.shape[0] - end, weights.shape[1], dtype=kind))
    return torch.cat(parts)


BACKEND: Backend = Backend("torch", grouped_linear)
