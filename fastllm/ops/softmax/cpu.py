"""softmax on the CPU kernels (csrc/cpu/kernels/softmax.inl): allocate, pass pointers."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty_like
from fastllm.ops.softmax.spec import sizes

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _forward(log: int) -> Callable[[Tensor, int], Tensor]:
    def run(input: Tensor, dim: int) -> Tensor:
        x = input.contiguous()
        out = empty_like(x)
        _C.softmax_fwd(
            _CODES[x.dtype], x.data_ptr(), out.data_ptr(), *sizes(x, dim), log,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    return run


def _backward(log: int) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(
        grad_output: Tensor, output: Tensor, dim: int, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        y = output.contiguous()
        dy, dx = grad_output.to(y.dtype).contiguous(), empty_like(y)
        _C.softmax_bwd(
            _CODES[y.dtype], dy.data_ptr(), y.data_ptr(), dx.data_ptr(), *sizes(y, dim), log,
            torch.get_num_threads(),
        )  # fmt: skip
        return (dx,)

    return run


def _supports(input: Tensor, dim: int) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    return None if input.dtype in _CODES else f"{input.dtype} input: computed by torch"


BACKENDS: dict[str, Backend] = {
    "softmax": Backend("cpu", _forward(0), _backward(0), _supports, fast=_C.fast_softmax),
    "log_softmax": Backend("cpu", _forward(1), _backward(1), _supports, fast=_C.fast_log_softmax),
}
