"""The matmul family in Triton: fastllm.kernels.matmul, imported by the first call."""

import functools
import importlib
import importlib.util
import os
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul import triton_tiles

Grads = tuple[Tensor | None, ...]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX = 2**31 - 1  # kernels take sizes in 32 bits


@functools.cache
def _kernels() -> Any:
    module = importlib.import_module("fastllm.kernels.matmul")
    module.pick = triton_tiles.pick  # type: ignore[attr-defined]
    return module


def _backward() -> Any:
    _kernels()
    return importlib.import_module("fastllm.kernels.matmul_backward")


def tf32(input: Tensor) -> bool:
    """Whether the user lets torch round the operands of fp32 products to TF32."""
    return input.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _rows(x: Tensor) -> Tensor:
    """[*, K] as a matrix, a view where there is one"""
    return x if x.dim() == 2 else x.reshape(prod(x.shape[:-1]), x.shape[-1])


# ---- forward


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    return _linear(input, weight, bias, residual, activation, False)[0]


def linear_pre(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    y, z = _linear(input, weight, bias, residual, activation, True)
    assert z is not None
    return y, z


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    preactivation: bool,
) -> tuple[Tensor, Tensor | None]:
    y, z = _kernels().matmul(
        _rows(input), weight.t(), bias, None if residual is None else _rows(residual),
        activation=activation, preactivation=preactivation, tf32=tf32(input),
    )  # fmt: skip
    shape = (*input.shape[:-1], weight.shape[0])
    return y.view(shape), None if z is None else z.view(shape)


def gated_linear(input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str) -> Tensor:
    return _gated(input, weight_gate, weight_up, activation, False)[0]


def gated_linear_pre(
    input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str
) -> tuple[Tensor, ...]:
    return _gated(input, weight_gate, weight_up, activation, True)


def _gated(
    input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str, preactivation: bool
) -> tuple[Any, ...]:
    made = _kernels().gated_matmul(
        _rows(input), weight_gate.t(), weight_up.t(), activation=activation,
        preactivation=preactivation, tf32=tf32(input),
    )  # fmt: skip
    shape = (*input.shape[:-1], weight_gate.shape[0])
    return tuple(t if t is None else t.view(shape) for t in made)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    out = _batched(*_matrices(input, other))
    shape = list(out.shape)
    if other.dim() == 1:
        del shape[-1]
    if input.dim() == 1:
        del shape[-1 if other.dim() == 1 else -2]
    return out.view(shape)


def _matrices(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both as matrices or batches of them: a vector is a row on the left, a column on the right."""
    return (
        input.unsqueeze(0) if input.dim() == 1 else input,
        other.unsqueeze(1) if other.dim() == 1 else other,
    )


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """a b, with batch sizes that broadcast."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*batch, a.shape[-2], b.shape[-1])
    if not prod(b.shape[:-2]) > 1 and a.dim() >= b.dim():  # one right side: one tall product
        out = _kernels().matmul(_rows(a), b.reshape(b.shape[-2:]), tf32=tf32(a))[0]
        return out.view(shape)
    a, b = (t.expand(*batch, *t.shape[-2:]).reshape(prod(batch), *t.shape[-2:]) for t in (a, b))
    return _kernels().batched_matmul(a, b, tf32=tf32(a)).view(shape)


# ---- backward


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: tuple[bool, ...],
) -> Grads:
    z = None
    if activation is not None and any(needs[:3]):
        z = _linear(input, weight, bias, None, None, False)[0]
    return _linear_backward(grad_output, None, input, weight, bias, z, activation, needs)


def linear_pre_backward(
    grad_output: Tensor,
    grad_pre: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor,
    activation: str | None,
    needs: tuple[bool, ...],
) -> Grads:
    return _linear_backward(grad_output, grad_pre, input, weight, bias, pre, activation, needs)


def _linear_backward(
    grad_output: Tensor,
    grad_pre: Tensor | None,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    activation: str | None,
    needs: tuple[bool, ...],
) -> Grads:
    bias_dtype = bias.dtype if needs[2] and bias is not None else None
    dz, db = _backward().slope_bwd(
        _plain(grad_output), None if z is None else _plain(z), activation,
        extra=None if grad_pre is None else _plain(grad_pre), bias_dtype=bias_dtype,
    )  # fmt: skip
    dx, dw = _backward().operands_bwd(dz, _rows(input), weight, needs[:2], tf32=tf32(input))
    residual = grad_output.clone() if needs[3] else None
    return None if dx is None else dx.view(input.shape), dw, db, residual


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b^T for [M, K] and [N, K], in total's own precision."""
    _kernels().matmul(a, b.t(), out=total, accumulate=True, tf32=tf32(a))


def gated_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    activation: str,
    needs: tuple[bool, ...],
) -> Grads:
    gate, up = (linear(input, w, None, None, None) for w in (weight_gate, weight_up))
    return gated_linear_pre_backward(
        grad_output, None, None, input, weight_gate, weight_up, gate, up, activation, needs
    )


def gated_linear_pre_backward(
    grad_output: Tensor,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    input: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    needs: tuple[bool, ...],
) -> Grads:
    extra = {
        name: None if grad is None else _plain(grad)
        for name, grad in (("extra_gate", grad_gate), ("extra_up", grad_up))
    }
    dgate, dup = _backward().gated_slope_bwd(
        _plain(grad_output), _plain(gate), _plain(up), activation, **extra
    )
    x, fast, run = _rows(input), tf32(input), _backward().operands_bwd
    dx, dwg = run(dgate, x, weight_gate, needs[:2], tf32=fast)
    _, dwu = run(dup, x, weight_up, (False, needs[2]), tf32=fast)
    if dx is not None:
        _kernels().matmul(dup, weight_up, out=dx, accumulate=True, tf32=fast)
    return None if dx is None else dx.view(input.shape), dwg, dwu


def matmul_backward(
    grad_output: Tensor, input: Tensor, other: Tensor, needs: tuple[bool, ...]
) -> Grads:
    a, b = _matrices(input, other)
    dy = grad_output.unsqueeze(-1) if other.dim() == 1 else grad_output
    dy = dy.unsqueeze(-2) if input.dim() == 1 else dy
    da = _batched(dy, b.mT).sum_to_size(a.shape).reshape(input.shape) if needs[0] else None
    db = None
    if needs[1]:
        if b.dim() == 2:  # shared by the batch, which joins the sum
            db = _kernels().matmul(_rows(a).t(), _rows(dy), tf32=tf32(a))[0]
        else:
            db = _batched(a.mT, dy).sum_to_size(b.shape)
        db = db.reshape(other.shape)
    return da, db


def _plain(x: Tensor) -> Tensor:
    """[*, N] as a row-major matrix"""
    return _rows(x).contiguous()


# ---- what is served


def _interpreted() -> bool:
    """Triton's interpreter was asked for: kernels then run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def available() -> str | None:
    """Why Triton cannot run here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted() or torch.xpu.is_available():
        return None
    if not torch.cuda.is_available():
        return "no GPU that Triton compiles for"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton needs compute capability 8.0 or later"
    return None


_DEVICES = ("cpu",) if _interpreted() else ("cuda", "xpu")


def supports(input: Tensor, *others: Any) -> str | None:
    """Why these operands are not served, or None."""
    if input.device.type not in _DEVICES:
        return f"input is on {input.device.type}"
    if input.dtype not in _DTYPES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    for tensor in (input, *others):
        if isinstance(tensor, Tensor) and tensor.numel() > _MAX and max(tensor.shape) > _MAX:
            return f"a side of {max(tensor.shape)} values"
    return None


BACKENDS: dict[str, Backend] = {
    op.__name__: Backend("triton", op, backward, supports, available)
    for op, backward in (
        (linear, linear_backward),
        (linear_pre, linear_pre_backward),
        (gated_linear, gated_linear_backward),
        (gated_linear_pre, gated_linear_pre_backward),
        (matmul, matmul_backward),
    )
}
