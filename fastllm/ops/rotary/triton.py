"""Rotary embedding in Triton: fastllm.kernels.rotary, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import DTYPES
from fastllm.ops.norm.triton import _interpreted, available
from fastllm.ops.rotary.reference import no_gradient, rotary_embedding_backward

Sizes = tuple[int, ...]


def rotate(x: Tensor, out: Tensor, *args: Any) -> None:
    """As cpu.rotate."""
    importlib.import_module("fastllm.kernels.rotary").rotate(x, out, *args)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.contiguous(), sin.contiguous()
    out = _empty(query), _empty(key)
    for x, y in zip((query, key), out, strict=True):
        rotate(x, y, cos, sin, rotary_dim, interleaved, False)
    return out


def backward(
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
    if dtype not in DTYPES or cos.dtype not in DTYPES:
        return rotary_embedding_backward(
            grad_query, grad_key, cos, sin, query_shape, key_shape, dtype, rotary_dim,
            interleaved, needs,
        )  # fmt: skip
    cos, sin = cos.contiguous(), sin.contiguous()

    def turn(grad: Tensor | None, shape: Sizes, needed: bool) -> Tensor | None:
        if not needed:
            return None
        if no_gradient(grad, shape):
            return cos.new_zeros(shape, dtype=dtype)
        out = cos.new_empty(shape, dtype=dtype)
        rotate(grad, out, cos, sin, rotary_dim, interleaved, True)  # type: ignore[arg-type]
        return out

    return turn(grad_query, query_shape, needs[0]), turn(grad_key, key_shape, needs[1])


def supports(query: Tensor, key: Tensor, cos: Tensor, *_: Any) -> str | None:
    if not (query.is_cpu if _interpreted() else query.is_cuda or query.is_xpu):
        return f"query is on {query.device.type}"
    for name, tensor in (("query", query), ("cos", cos)):
        if tensor.dtype not in DTYPES:
            return f"{tensor.dtype} {name}: computed by torch"
    return None


BACKEND: Backend = Backend("triton", rotary_embedding, backward, supports, available)
