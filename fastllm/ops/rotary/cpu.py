"""Rotary embedding on the CPU kernel (csrc/cpu/kernels/rotary.inl)."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import adjacent, empty
from fastllm.ops.rotary.reference import no_gradient, rotary_embedding_backward

Sizes = tuple[int, ...]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    query, key = adjacent(query), adjacent(key)
    cos, sin = cos.contiguous(), sin.contiguous()
    out = empty(query.shape, query.dtype), empty(key.shape, key.dtype)
    rotate(query, out[0], cos, sin, rotary_dim, interleaved, False)
    rotate(key, out[1], cos, sin, rotary_dim, interleaved, False)
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
    if dtype not in CODES or cos.dtype not in CODES:
        return rotary_embedding_backward(
            grad_query, grad_key, cos, sin, query_shape, key_shape, dtype, rotary_dim,
            interleaved, needs,
        )  # fmt: skip
    cos, sin = cos.contiguous(), sin.contiguous()

    def turn(grad: Tensor | None, shape: Sizes, needed: bool) -> Tensor | None:
        if not needed:
            return None
        if no_gradient(grad, shape):
            return torch.zeros(shape, dtype=dtype)
        grad = adjacent(grad.to(dtype))  # type: ignore[union-attr]
        out = empty(shape, dtype)
        rotate(grad, out, cos, sin, rotary_dim, interleaved, True)
        return out

    return turn(grad_query, query_shape, needs[0]), turn(grad_key, key_shape, needs[1])


def rotate(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool, back: bool
) -> None:
    """Writes x, rotated, to out, which may be x; columns of both are adjacent."""
    width = cos.shape[-1]
    step = cos.shape[-2] * width if cos.dim() == 3 and cos.shape[0] > 1 else 0
    _C.rotate(
        CODES[x.dtype], CODES[cos.dtype], x.data_ptr(), out.data_ptr(), cos.data_ptr(),
        sin.data_ptr(), *x.shape, rotary_dim, width, step, *x.stride()[:3], *out.stride()[:3],
        interleaved, back, torch.get_num_threads(),
    )  # fmt: skip


def supports(query: Tensor, key: Tensor, cos: Tensor, *_: Any) -> str | None:
    if not query.is_cpu:
        return f"query on {query.device}: the kernels run on the CPU"
    for name, tensor in (("query", query), ("cos", cos)):
        if tensor.dtype not in CODES:
            return f"{tensor.dtype} {name}: computed by torch"
    return None


BACKEND: Backend = Backend("cpu", rotary_embedding, backward, supports)
