"""Embedding in Triton: fastllm.kernels.embedding, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import DTYPES
from fastllm.ops.norm.triton import _interpreted, available


def embedding(weight: Tensor, input: Tensor, padding_idx: int, scale_grad_by_freq: bool) -> Tensor:
    return torch.embedding(weight, input)  # a plain gather: nothing to gain on torch's


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
    kernels = importlib.import_module("fastllm.kernels.embedding")
    dy = grad_output.to(dtype).contiguous()
    return (kernels.embedding_bwd(dy, input, num_embeddings, padding_idx, scale_grad_by_freq),)


def supports(weight: Tensor, input: Tensor, *_: Any) -> str | None:
    if not (weight.is_cpu if _interpreted() else weight.is_cuda or weight.is_xpu):
        return f"weight is on {weight.device.type}"
    return None if weight.dtype in DTYPES else f"{weight.dtype} weight: computed by torch"


BACKEND: Backend = Backend("triton", embedding, embedding_backward, supports, available)
