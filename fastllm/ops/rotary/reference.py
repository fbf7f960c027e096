"""Rotary position embedding in plain torch: any float dtype, in float64 the oracle.

Su et al. 2021. Half-split: element i is rotated with i + R/2 (Hugging Face's rotate_half, NeoX);
interleaved: element 2i with 2i + 1 (the paper, GPT-J).
"""

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """x cos + partner(x) sin, in float32 at least, rounded once"""
    c, s = (_full(_wide(t), rotary_dim, interleaved) for t in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        turned, rest = _wide(x).split([rotary_dim, x.shape[-1] - rotary_dim], -1)
        out = turned * c + partner(turned, interleaved) * s
        return torch.cat([out, rest], -1).to(x.dtype)

    return rotate(query), rotate(key)


def rotary_embedding_backward(
    grad_query: Tensor | None,
    grad_key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_shape: Sizes,
    key_shape: Sizes,
    dtype: torch.dtype,
    rotary_dim: int,
    interleaved: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx = dy cos - partner(dy sin): the rotation by the opposite angle"""
    c, s = (_full(_wide(t), rotary_dim, interleaved) for t in (cos, sin))

    def rotate(dy: Tensor | None, shape: Sizes, needed: bool) -> Tensor | None:
        if not needed:
            return None
        if dy is None or no_gradient(dy, shape):
            return cos.new_zeros(shape, dtype=dtype)
        turned, rest = _wide(dy).split([rotary_dim, shape[-1] - rotary_dim], -1)
        out = turned * c - partner(turned * s, interleaved)
        return torch.cat([out, rest], -1).to(dtype)

    return rotate(grad_query, query_shape, needs[0]), rotate(grad_key, key_shape, needs[1])


def no_gradient(grad: Tensor | None, shape: Sizes) -> bool:
    """No gradient reached this output: None, or what stands for the first one."""
    return grad is None or tuple(grad.shape) != tuple(shape)


def partner(x: Tensor, interleaved: bool) -> Tensor:
    """The other element of each pair, negated for the first of the two."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _full(table: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """A table as wide as what it rotates, with a dimension for the heads."""
    table = table.unsqueeze(-3)
    if table.shape[-1] == rotary_dim:
        return table
    if interleaved:
        return table.repeat_interleave(2, -1)
    return torch.cat([table, table], -1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
