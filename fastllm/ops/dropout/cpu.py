"""dropout_add on the CPU kernels (csrc/cpu/kernels/dropout.inl)."""

from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _apply(x: Tensor, residual: Tensor | None, seed: Tensor, p: float) -> Tensor:
    out = empty(x.shape, x.dtype)
    _C.dropout(
        CODES[x.dtype], x.data_ptr(), 0 if residual is None else residual.data_ptr(),
        out.data_ptr(), x.numel(), p, int(seed), torch.get_num_threads(),
    )  # fmt: skip
    return out


def dropout_add(input: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    return _apply(input.contiguous(), residual.contiguous(), seed, p)


def dropout_add_backward(
    grad_output: Tensor, seed: Tensor, shape: Any, dtype: torch.dtype, p: float, needs: Any
) -> tuple[Tensor | None, Tensor | None]:
    dy = grad_output.to(dtype)
    dx = _apply(dy.contiguous(), None, seed, p) if needs[0] else None
    return dx, dy if needs[1] else None


def supports(input: Tensor, *_: Any) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    return None if input.dtype in CODES else f"{input.dtype} input: computed by torch"


BACKEND: Backend = Backend("cpu", dropout_add, dropout_add_backward, supports)
