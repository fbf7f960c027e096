"""softmax in Triton: fastllm.kernels.softmax, imported by the first call."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import DTYPES, MAX_COLS
from fastllm.ops.norm.triton import _interpreted, available

_loaded: Any = None


def _kernels() -> Any:
    global _loaded
    if _loaded is None:
        _loaded = importlib.import_module("fastllm.kernels.softmax")
    return _loaded


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with `dim` last, contiguous."""
    return tensor.movedim(dim, -1).contiguous() if tensor.dim() > 1 else tensor.contiguous()


def _back(rows: Tensor, dim: int) -> Tensor:
    return rows.movedim(-1, dim).contiguous() if rows.dim() > 1 else rows


def _forward(log: bool) -> Callable[[Tensor, int], Tensor]:
    def run(input: Tensor, dim: int) -> Tensor:
        return _back(_kernels().softmax_fwd(_rows(input, dim), log), dim)

    return run


def _backward(log: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(
        grad_output: Tensor, output: Tensor, dim: int, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        dy, y = _rows(grad_output, dim), _rows(output, dim)
        return (_back(_kernels().softmax_bwd(dy, y, log), dim),)

    return run


def _supports(input: Tensor, dim: int) -> str | None:
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    if input.device.type not in allowed:
        return f"input is on {input.device.type}"
    if input.dtype not in DTYPES:
        return f"{input.dtype} input: computed by torch"
    n = input.shape[dim] if input.dim() else 1
    return None if n <= MAX_COLS else f"rows of {n} values"


BACKENDS: dict[str, Backend] = {
    "softmax": Backend("triton", _forward(False), _backward(False), _supports, available),
    "log_softmax": Backend("triton", _forward(True), _backward(True), _supports, available),
}
