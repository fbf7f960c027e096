"""What rotary embedding takes: schema, checks, shapes of results, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

Sizes = tuple[int, ...]

SCHEMA = Schema(
    "Tensor query, Tensor key, Tensor cos, Tensor sin, SymInt rotary_dim, bool interleaved",
    "(Tensor, Tensor)",
    "Tensor? grad_query, Tensor? grad_key, Tensor cos, Tensor sin, SymInt[] query_shape, "
    "SymInt[] key_shape, ScalarType dtype, SymInt rotary_dim, bool interleaved",
    "(Tensor, Tensor)",
)


def check(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> None:
    """TypeError or ValueError that names the argument."""
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            found = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating point Tensor, found {found}")
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, T, D], found {describe(query)}")
    batch, _, length, dim = query.shape
    if (
        key.dim() != 4
        or (key.shape[0], *key.shape[2:]) != (batch, length, dim)
        or key.dtype != query.dtype
        or key.device != query.device
    ):
        raise ValueError(
            f"key: expected query's ({describe(query)}) sizes but for the heads, its dtype and "
            f"device, found {describe(key)}"
        )
    if not 0 < rotary_dim <= dim or rotary_dim % 2:
        raise ValueError(f"cos: expected an even width of 2 to {dim}, found {rotary_dim}")
    widths = (rotary_dim, rotary_dim // 2)
    if (
        cos.dim() not in (2, 3)
        or cos.shape[-1] not in widths
        or cos.shape[-2] != length
        or (cos.dim() == 3 and cos.shape[0] not in (1, batch))
        or cos.device != query.device
    ):
        raise ValueError(
            f"cos: expected [{length}, R] or [{batch}, {length}, R] on {query.device}, R being "
            f"{widths[0]} or {widths[1]}, found {describe(cos)}"
        )
    if sin.shape != cos.shape or sin.dtype != cos.dtype or sin.device != cos.device:
        raise ValueError(f"sin: expected what cos is ({describe(cos)}), found {describe(sin)}")


def fake(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """Both outputs, contiguous."""
    like = torch.contiguous_format
    return torch.empty_like(query, memory_format=like), torch.empty_like(key, memory_format=like)


def fake_backward(
    cos: Tensor, sin: Tensor, query_shape: Sizes, key_shape: Sizes, dtype: torch.dtype, *_: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of query and key."""
    return cos.new_empty(query_shape, dtype=dtype), cos.new_empty(key_shape, dtype=dtype)


def cost(query: Tensor, key: Tensor, cos: Tensor, *_: Any) -> Cost:
    """Either way reads two and writes two; the tables are small beside them."""
    n = query.numel() + key.numel()
    size = 2 * n * query.element_size() + 2 * cos.numel() * cos.element_size()
    return Cost(size, size, 3 * n, 3 * n)
