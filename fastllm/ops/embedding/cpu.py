"""Embedding on the CPU kernels (csrc/cpu/kernels/embedding.inl)."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def embedding(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    index = input.contiguous()
    rows, cols = weight.shape
    wide, count = index.dtype == torch.int64, index.numel()
    bad = _C.first_outside(wide, index.data_ptr(), count, rows)
    if bad >= 0:
        raise IndexError(
            f"input: expected indices of 0 to {rows - 1}, found {index.view(-1)[bad].item()}"
        )
    if weight.stride(1) != 1 and cols != 1:
        weight = weight.contiguous()
    size = weight.element_size()
    out = empty((*input.shape, cols), weight.dtype)
    _C.embedding_fwd(
        wide, index.data_ptr(), weight.data_ptr(), out.data_ptr(), count, cols * size,
        weight.stride(0) * size, torch.get_num_threads(),
    )  # fmt: skip
    return out


def embedding_backward(
    grad_output: Tensor,
    input: Tensor,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
    padding_idx: int,
    scale_grad_by_freq: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    dy, index = grad_output.to(dtype).contiguous(), input.contiguous()
    grad = empty((num_embeddings, embedding_dim), dtype)
    room = torch.empty(num_embeddings + 1 + index.numel(), dtype=torch.int64)
    _C.embedding_bwd(
        CODES[dtype], index.dtype == torch.int64, dy.data_ptr(), index.data_ptr(),
        grad.data_ptr(), room.data_ptr(), index.numel(), num_embeddings, embedding_dim,
        padding_idx, scale_grad_by_freq, torch.get_num_threads(),
    )  # fmt: skip
    return (grad,)


def supports(weight: Tensor, input: Tensor, *_: Any) -> str | None:
    if not weight.is_cpu:
        return f"weight on {weight.device}: the kernels run on the CPU"
    return None if weight.dtype in CODES else f"{weight.dtype} weight: computed by torch"


BACKEND: Backend = Backend("cpu", embedding, embedding_backward, supports, fast=_C.fast_embedding)
