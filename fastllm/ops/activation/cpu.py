"""The activations on the CPU kernels (csrc/cpu/kernels/activation.inl)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import POOL_FROM, empty
from fastllm.ops.activation.layout import as_rows
from fastllm.ops.activation.spec import GATED

Needs = tuple[bool, ...]

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SILU: int = 0
GELU: int = 1
GELU_TANH: int = 2
RELU2: int = 3
_GELU = {"none": GELU, "tanh": GELU_TANH}
_threads = torch.get_num_threads
_empty_like = torch.empty_like
_fwd, _bwd = _C.activation_fwd, _C.activation_bwd
_SMALL = POOL_FROM // 8  # elements: less than this is not for the pool in any dtype


# ---- forward


def silu(input: Tensor) -> Tensor:
    return _unary(SILU, input)


def gelu(input: Tensor, approximate: str) -> Tensor:
    return _unary(_GELU[approximate], input)


def relu2(input: Tensor) -> Tensor:
    return _unary(RELU2, input)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(SILU, gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return _gated(_GELU[approximate], gate, up)


def _unary(function: int, x: Tensor) -> Tensor:
    if x.is_contiguous():
        rows, cols = 1, x.numel()
        step = cols
    else:
        (x,), rows, cols, (step,) = as_rows(x)
    out = _new(x, rows * cols)
    _fwd(CODES[x.dtype], function, x.data_ptr(), 0, out.data_ptr(), rows, cols, step, 0, _threads())
    return out


def _gated(function: int, gate: Tensor, up: Tensor) -> Tensor:
    if gate.is_contiguous() and up.is_contiguous():
        rows, cols = 1, gate.numel()
        step = up_step = cols
    else:
        (gate, up), rows, cols, (step, up_step) = as_rows(gate, up)
    out = _new(gate, rows * cols)
    _fwd(
        CODES[gate.dtype], function, gate.data_ptr(), up.data_ptr(), out.data_ptr(), rows, cols,
        step, up_step, _threads(),
    )  # fmt: skip
    return out


def _new(like: Tensor, size: int) -> Tensor:
    """A contiguous tensor like this one, from the pool if it is large."""
    if size < _SMALL:
        return _empty_like(like, memory_format=torch.contiguous_format)
    return empty(like.shape, like.dtype)


# ---- backward


def silu_backward(grad_output: Tensor, input: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return _unary_backward(SILU, grad_output, input, needs)


def gelu_backward(
    grad_output: Tensor, input: Tensor, approximate: str, needs: Needs
) -> tuple[Tensor | None]:
    return _unary_backward(_GELU[approximate], grad_output, input, needs)


def relu2_backward(grad_output: Tensor, input: Tensor, needs: Needs) -> tuple[Tensor | None]:
    return _unary_backward(RELU2, grad_output, input, needs)


def swiglu_backward(
    grad_output: Tensor, gate: Tensor, up: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    return _gated_backward(SILU, grad_output, gate, up, needs)


def geglu_backward(
    grad_output: Tensor, gate: Tensor, up: Tensor, approximate: str, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    return _gated_backward(_GELU[approximate], grad_output, gate, up, needs)


def _unary_backward(function: int, dy: Tensor, x: Tensor, needs: Needs) -> tuple[Tensor | None]:
    if not needs[0]:
        return (None,)
    (dy, x), rows, cols, (dy_step, step) = as_rows(dy.to(x.dtype), x)
    dx = _new(x, rows * cols)
    _bwd(
        CODES[x.dtype], function, dy.data_ptr(), x.data_ptr(), 0, dx.data_ptr(), 0, rows, cols,
        dy_step, step, 0, _threads(),
    )  # fmt: skip
    return (dx,)


def _gated_backward(
    function: int, dy: Tensor, gate: Tensor, up: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    (dy, gate, up), rows, cols, steps = as_rows(dy.to(gate.dtype), gate, up)
    dgate = _new(gate, rows * cols) if needs[0] else None
    dup = _new(up, rows * cols) if needs[1] else None
    _bwd(
        CODES[gate.dtype], function, dy.data_ptr(), gate.data_ptr(), up.data_ptr(),
        0 if dgate is None else dgate.data_ptr(), 0 if dup is None else dup.data_ptr(), rows, cols,
        *steps, _threads(),
    )  # fmt: skip
    return dgate, dup


# ---- what is served


def _why_not_unary(input: Tensor, *_: Any) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    return None if input.dtype in CODES else f"{input.dtype} input: computed by torch"


def _why_not_gated(gate: Tensor, up: Tensor, *_: Any) -> str | None:
    if gate.dtype != up.dtype:
        return f"gate is {gate.dtype}, up is {up.dtype}: computed by torch"
    return _why_not_unary(gate)


def _backend(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Backend:
    why_not = _why_not_gated if name in GATED else _why_not_unary
    return Backend("cpu", forward, backward, why_not, fast=getattr(_C, f"fast_{name}"))


_BOTH: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "silu": (silu, silu_backward),
    "gelu": (gelu, gelu_backward),
    "relu2": (relu2, relu2_backward),
    "swiglu": (swiglu, swiglu_backward),
    "geglu": (geglu, geglu_backward),
}
BACKENDS: dict[str, Backend] = {name: _backend(name, *both) for name, both in _BOTH.items()}
