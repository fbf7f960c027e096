"""The activations in Triton: fastllm.kernels.activation, imported by the first call."""

import importlib
from typing import Any

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.activation import cpu
from fastllm.ops.activation.layout import as_rows
from fastllm.ops.norm.gpu import DTYPES
from fastllm.ops.norm.triton import _interpreted, available

Needs = tuple[bool, ...]


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.activation")


def _unary(function: int) -> tuple[Any, Any]:
    def forward(input: Tensor) -> Tensor:
        (x,), rows, cols, (step,) = as_rows(input)
        return _kernels().activation_fwd(function, x, None, rows, cols, step, 0)

    def backward(grad_output: Tensor, input: Tensor, needs: Needs) -> tuple[Tensor | None]:
        if not needs[0]:
            return (None,)
        (dy, x), rows, cols, steps = as_rows(grad_output.to(input.dtype), input)
        run = _kernels().activation_bwd
        return run(function, dy, x, None, rows, cols, *steps, 0, (True, False))[:1]

    return forward, backward


def _gated(function: int) -> tuple[Any, Any]:
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        (gate, up), rows, cols, steps = as_rows(gate, up)
        return _kernels().activation_fwd(function, gate, up, rows, cols, *steps)

    def backward(grad_output: Tensor, gate: Tensor, up: Tensor, needs: Needs) -> Any:
        (dy, gate, up), rows, cols, steps = as_rows(grad_output.to(gate.dtype), gate, up)
        return _kernels().activation_bwd(function, dy, gate, up, rows, cols, *steps, needs)

    return forward, backward


def _by_name(make: Any) -> tuple[Any, Any]:
    """Of an op whose last argument says which GELU it is."""
    made = {"none": make(cpu.GELU), "tanh": make(cpu.GELU_TANH)}

    def forward(*args: Any) -> Tensor:
        return made[args[-1]][0](*args[:-1])

    def backward(*args: Any) -> Any:
        return made[args[-2]][1](*args[:-2], args[-1])

    return forward, backward


def _why_not_unary(input: Tensor, *_: Any) -> str | None:
    on_cpu = _interpreted()
    if not (input.is_cpu if on_cpu else input.is_cuda or input.is_xpu):
        return f"input is on {input.device.type}"
    if input.dtype not in DTYPES:
        return f"{input.dtype} input: computed by torch"
    return "more than 2^40 values" if input.numel() > 2**40 else None


def _why_not_gated(gate: Tensor, up: Tensor, *_: Any) -> str | None:
    if gate.dtype != up.dtype:
        return f"{up.dtype} up with {gate.dtype} gate: computed by torch"
    return _why_not_unary(gate)


def _backend(pair: tuple[Any, Any], supports: Any) -> Backend:
    return Backend("triton", *pair, supports, available)


BACKENDS: dict[str, Backend] = {
    "silu": _backend(_unary(cpu.SILU), _why_not_unary),
    "gelu": _backend(_by_name(_unary), _why_not_unary),
    "relu2": _backend(_unary(cpu.RELU2), _why_not_unary),
    "swiglu": _backend(_gated(cpu.SILU), _why_not_gated),
    "geglu": _backend(_by_name(_gated), _why_not_gated),
}
