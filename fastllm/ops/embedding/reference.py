"""Embedding in plain torch: any float dtype, differentiable, in float64 the oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor

Needs = tuple[bool, ...]


def embedding(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    """weight[input]: torch's own gather, whose gradient is exact in float64"""
    padding = None if padding_idx < 0 else padding_idx
    return F.embedding(input, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def embedding_backward(
    grad_output: Tensor,
    input: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    padding_idx: int,
    scale_grad_by_freq: bool,
    needs: Needs,
) -> tuple[Tensor | None]:
    """The sum of the rows of each index, in float32 at least, rounded once"""
    if not needs[0]:
        return (None,)
    keep, scale = _shares(input, num_embeddings, padding_idx, scale_grad_by_freq)
    wide = grad_output.to(torch.promote_types(grad_output.dtype, torch.float32))
    rows = wide * (scale * keep).to(wide.dtype).unsqueeze(-1)
    rows = torch.where(keep.unsqueeze(-1), rows, 0.0)
    total = wide.new_zeros((num_embeddings, embedding_dim))
    flat = rows.reshape(-1, embedding_dim)
    return (total.index_add(0, input.reshape(-1), flat).to(dtype),)


def _shares(input: Tensor, rows: int, padding_idx: int, by_frequency: bool) -> tuple:
    """For each index: whether it has a gradient, and the factor on it."""
    keep = input != padding_idx
    if not by_frequency:
        return keep, torch.ones_like(input, dtype=torch.float64)
    flat = input.reshape(-1)
    counts = torch.zeros(rows, dtype=torch.float64, device=input.device)
    counts = counts.index_add(0, flat, torch.ones_like(flat, dtype=torch.float64))
    return keep, 1.0 / counts[input]
