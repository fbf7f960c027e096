"""dropout_add in Triton: fastllm.kernels.dropout, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.attention.random import factor, threshold
from fastllm.ops.norm.gpu import DTYPES
from fastllm.ops.norm.triton import _interpreted, available


def _apply(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    kernels = importlib.import_module("fastllm.kernels.dropout")
    return kernels.dropout(x, residual, seed, factor(p), threshold(p))  # type: ignore[no-any-return]


def dropout_add(input: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    return _apply(input.contiguous(), residual.contiguous(), seed, p)


def dropout_add_backward(
    grad_output: Tensor, seed: Tensor, shape: Any, dtype: torch.dtype, p: float, needs: Any
) -> tuple[Tensor | None, Tensor | None]:
    dy = grad_output.to(dtype)
    dx = _apply(dy.contiguous(), None, seed, p) if needs[0] else None
    return dx, dy if needs[1] else None


def supports(input: Tensor, *_: Any) -> str | None:
    if not (input.is_cpu if _interpreted() else input.is_cuda or input.is_xpu):
        return f"input is on {input.device.type}"
    return None if input.dtype in DTYPES else f"{input.dtype} input: computed by torch"


BACKEND: Backend = Backend("triton", dropout_add, dropout_add_backward, supports, available)
