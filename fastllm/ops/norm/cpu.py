"""The norms on the CPU kernels (csrc/cpu/kernels): allocate, pass pointers, nothing else.

A small norm takes less than a microsecond, so attribute accesses are counted here.
"""

from math import prod

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import POOL_FROM, empty_like

Shape = tuple[int, ...]
Grads = tuple[Tensor | None, ...]

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_threads = torch.get_num_threads
_empty_like = torch.empty_like
_rms_norm_fwd, _layer_norm_fwd = _C.rms_norm_fwd, _C.layer_norm_fwd
_SMALL = POOL_FROM // 8  # elements: less than this is not for the pool in any dtype


# ---- forward


def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    """output, as the contract of the op says."""
    x = input if input.is_contiguous() else input.contiguous()
    size = x.numel()
    out = _empty_like(x) if size < _SMALL else empty_like(x)
    code = wcode = _CODES[x.dtype]
    w = 0
    if weight is not None:
        if not weight.is_contiguous():
            weight = weight.contiguous()
        w, wcode = weight.data_ptr(), _CODES[weight.dtype]
    cols = normalized_shape[0] if len(normalized_shape) == 1 else prod(normalized_shape)
    _rms_norm_fwd(
        code, wcode, x.data_ptr(), 0, w, out.data_ptr(), 0, size // cols if cols else 0, cols, eps,
        weight_offset, _threads(),
    )  # fmt: skip
    return out


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    """output, as the contract of the op says."""
    x = input if input.is_contiguous() else input.contiguous()
    size = x.numel()
    out = _empty_like(x) if size < _SMALL else empty_like(x)
    wcode = w = b = 0
    if weight is not None:
        if not weight.is_contiguous():
            weight = weight.contiguous()
        w, wcode = weight.data_ptr(), _CODES[weight.dtype]
    if bias is not None:
        if not bias.is_contiguous():
            bias = bias.contiguous()
        b, wcode = bias.data_ptr(), _CODES[bias.dtype]
    cols = normalized_shape[0] if len(normalized_shape) == 1 else prod(normalized_shape)
    _layer_norm_fwd(
        _CODES[x.dtype], wcode, x.data_ptr(), 0, w, b, out.data_ptr(), 0,
        size // cols if cols else 0, cols, eps, weight_offset, _threads(),
    )  # fmt: skip
    return out


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """(output, new_residual), as the contract of the op says."""
    x, r = input.contiguous(), residual.contiguous()
    out, total = empty_like(x), empty_like(x)
    weight, _, wcode = _affine(weight, None)
    cols = prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    _C.rms_norm_fwd(
        _CODES[x.dtype], wcode, x.data_ptr(), r.data_ptr(), _ptr(weight), out.data_ptr(),
        total.data_ptr(), rows, cols, eps, weight_offset, _threads(),
    )  # fmt: skip
    return out, total


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """(output, new_residual), as the contract of the op says."""
    x, r = input.contiguous(), residual.contiguous()
    out, total = empty_like(x), empty_like(x)
    weight, bias, wcode = _affine(weight, bias)
    cols = prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    _C.layer_norm_fwd(
        _CODES[x.dtype], wcode, x.data_ptr(), r.data_ptr(), _ptr(weight), _ptr(bias),
        out.data_ptr(), total.data_ptr(), rows, cols, eps, weight_offset, _threads(),
    )  # fmt: skip
    return out, total


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """output, as the contract of the op says."""
    x = input.contiguous()
    out = empty_like(x)
    weight, bias, wcode = _affine(weight, bias)
    batch, channels, *spatial = x.shape
    _C.group_norm_fwd(
        _CODES[x.dtype], wcode, x.data_ptr(), _ptr(weight), _ptr(bias), out.data_ptr(),
        batch, channels, num_groups, prod(spatial), eps, _threads(),
    )  # fmt: skip
    return out


# ---- backward


def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> Grads:
    """(grad_input, grad_weight), None where not needed."""
    return add_rms_norm_backward(
        grad_output, None, input, normalized_shape, weight, eps, weight_offset, needs
    )


def layer_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> Grads:
    """(grad_input, grad_weight, grad_bias), None where not needed."""
    return add_layer_norm_backward(
        grad_output, None, input, normalized_shape, weight, bias, eps, weight_offset, needs
    )


def add_rms_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> Grads:
    """(grad of input and residual, grad_weight), None where not needed."""
    x = new_residual.contiguous()
    dy, dh = _like(grad_output, x), _like(grad_new_residual, x)
    weight, _, wcode = _affine(weight, None)
    dx = empty_like(x) if needs[0] else None
    dw = _empty_like(weight) if needs[1] and weight is not None else None
    cols = prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    _C.rms_norm_bwd(
        _CODES[x.dtype], wcode, _ptr(dy), _ptr(dh), x.data_ptr(), _ptr(weight), _ptr(dx), _ptr(dw),
        rows, cols, eps, weight_offset, _threads(),
    )  # fmt: skip
    return dx, dw


def add_layer_norm_backward(
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    new_residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> Grads:
    """(grad of input and residual, grad_weight, grad_bias), None where not needed."""
    x = new_residual.contiguous()
    dy, dh = _like(grad_output, x), _like(grad_new_residual, x)
    weight, bias, wcode = _affine(weight, bias)
    dx = empty_like(x) if needs[0] else None
    dw = _empty_like(weight) if needs[1] and weight is not None else None
    db = _empty_like(bias) if needs[2] and bias is not None else None
    cols = prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    _C.layer_norm_bwd(
        _CODES[x.dtype], wcode, _ptr(dy), _ptr(dh), x.data_ptr(), _ptr(weight), _ptr(dx), _ptr(dw),
        _ptr(db), rows, cols, eps, weight_offset, _threads(),
    )  # fmt: skip
    return dx, dw, db


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, ...],
) -> Grads:
    """(grad_input, grad_weight, grad_bias), None where not needed."""
    x = input.contiguous()
    dy = _like(grad_output, x)
    weight, bias, wcode = _affine(weight, bias)
    dx = empty_like(x) if needs[0] else None
    dw = _empty_like(weight) if needs[1] and weight is not None else None
    db = _empty_like(bias) if needs[2] and bias is not None else None
    batch, channels, *spatial = x.shape
    _C.group_norm_bwd(
        _CODES[x.dtype], wcode, _ptr(dy), x.data_ptr(), _ptr(weight), _ptr(dx), _ptr(dw), _ptr(db),
        batch, channels, num_groups, prod(spatial), eps, _threads(),
    )  # fmt: skip
    return dx, dw, db


def _ptr(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _like(grad: Tensor | None, x: Tensor) -> Tensor | None:
    """An upstream gradient as the kernels take it: contiguous, of x's dtype."""
    return None if grad is None else grad.to(x.dtype).contiguous()


def _affine(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """weight and bias contiguous, and the code of the dtype that they share."""
    code = 0
    if weight is not None:
        weight = weight.contiguous()
        code = _CODES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        code = _CODES[bias.dtype]
    return weight, bias, code


# ---- what is served


def _why_not(input: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in _CODES:
        return f"{_name(input)} input: computed by torch"
    for param in (weight, bias):
        if param is None:
            continue
        if not param.is_cpu:
            return f"weight or bias on {param.device}, input on the CPU"
        if param.dtype not in _CODES:
            return f"{_name(param)} weight or bias: computed by torch"
    if bias is not None and weight is not None and weight.dtype != bias.dtype:
        return f"weight is {_name(weight)}, bias is {_name(bias)}: computed by torch"
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _rms(
    input: Tensor, shape: Shape, weight: Tensor | None, eps: float, offset: float
) -> str | None:
    if input.dtype in _CODES and input.is_cpu and (
        weight is None or (weight.dtype in _CODES and weight.is_cpu)
    ):  # fmt: skip
        return None
    return _why_not(input, weight)


def _layer(
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
) -> str | None:
    if bias is None:
        return _rms(input, shape, weight, eps, offset)
    if weight is not None and input.is_cpu and weight.is_cpu and bias.is_cpu:
        kind = weight.dtype
        if kind in _CODES and bias.dtype is kind and input.dtype in _CODES:
            return None
    return _why_not(input, weight, bias)


def _add_rms(
    input: Tensor, residual: Tensor, shape: Shape, weight: Tensor | None, *_: float
) -> str | None:
    return _why_not_residual(input, residual) or _why_not(input, weight)


def _add_layer(
    input: Tensor,
    residual: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: float,
) -> str | None:
    return _why_not_residual(input, residual) or _why_not(input, weight, bias)


def _why_not_residual(input: Tensor, residual: Tensor) -> str | None:
    if residual.dtype != input.dtype:
        return f"residual is {_name(residual)}, input is {_name(input)}: computed by torch"
    return None if residual.is_cpu else f"residual on {residual.device}: expected the CPU"


def _group(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    if not input.is_contiguous() and _channels_last(input):
        return "channels_last input: torch keeps its layout"
    return _why_not(input, weight, bias)


def _channels_last(input: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = formats.get(input.dim())
    return kind is not None and input.is_contiguous(memory_format=kind)


BACKENDS: dict[str, Backend] = {
    "rms_norm": Backend("cpu", rms_norm, rms_norm_backward, _rms, fast=_C.fast_rms_norm),
    "layer_norm": Backend("cpu", layer_norm, layer_norm_backward, _layer, fast=_C.fast_layer_norm),
    "add_rms_norm": Backend(
        "cpu", add_rms_norm, add_rms_norm_backward, _add_rms, fast=_C.fast_add_rms_norm
    ),
    "add_layer_norm": Backend(
        "cpu", add_layer_norm, add_layer_norm_backward, _add_layer, fast=_C.fast_add_layer_norm
    ),
    "group_norm": Backend("cpu", group_norm, group_norm_backward, _group),
}
