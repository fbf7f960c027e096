"""The row norms in CUDA C++: fastllm._cuda, which is there when nvcc was at build time."""

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import Shape, count, plain, refusals

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> str | None:
    """Why these kernels cannot run here at all, or None."""
    if _cuda is None:
        return "built without CUDA: nvcc was not found"
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "these kernels need compute capability 8.0 or later"
    return None


def _forward(
    center: bool,
    input: Tensor,
    residual: Tensor | None,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
) -> tuple[Tensor, Tensor | None]:
    x, r, w, b = plain(input), plain(residual), plain(weight), plain(bias)
    y = torch.empty_like(x)
    h = None if r is None else torch.empty_like(x)
    size = x.numel()
    if size:
        cols = count(shape)
        index = x.device.index
        _cuda.norm_fwd(
            center,
            _CODES[x.dtype],
            _code(x, w, b),
            x.data_ptr(),
            _address(r),
            _address(w),
            _address(b),
            y.data_ptr(),
            _address(h),
            size // cols,
            cols,
            eps,
            offset,
            index,
            torch._C._cuda_getCurrentRawStream(index),
        )
    return y, h


def _backward(
    center: bool,
    grad_output: Tensor,
    grad_new_residual: Tensor | None,
    input: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dy, dh, h, w = plain(grad_output), plain(grad_new_residual), plain(input), plain(weight)
    dx = torch.empty_like(h) if needs[0] else None
    dw = torch.empty_like(w) if needs[1] and w is not None else None
    db = torch.empty_like(plain(bias)) if needs[2] and bias is not None else None
    size = h.numel()
    if not size:
        return dx, None if dw is None else dw.zero_(), None if db is None else db.zero_()
    cols = count(shape)
    rows, index, code = size // cols, h.device.index, _CODES[h.dtype]
    sums = (dw is not None) + (db is not None)
    values = _cuda.norm_bwd_workspace(code, sums, rows, cols, index)
    workspace = torch.empty(values, dtype=torch.float32, device=h.device)
    _cuda.norm_bwd(
        center,
        code,
        _code(h, w, bias),
        dy.data_ptr(),
        _address(dh),
        h.data_ptr(),
        _address(w),
        _address(dx),
        _address(dw),
        _address(db),
        workspace.data_ptr(),
        rows,
        cols,
        eps,
        offset,
        index,
        torch._C._cuda_getCurrentRawStream(index),
    )
    return dx, dw, db


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _code(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> int:
    """The dtype of the parameters; x's where there are none."""
    given = weight if weight is not None else bias
    return _CODES[x.dtype if given is None else given.dtype]


def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    return _forward(False, input, None, normalized_shape, weight, None, eps, weight_offset)[0]


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    return _forward(True, input, None, normalized_shape, weight, bias, eps, weight_offset)[0]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor | None]:
    return _forward(False, input, residual, normalized_shape, weight, None, eps, weight_offset)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor | None]:
    return _forward(True, input, residual, normalized_shape, weight, bias, eps, weight_offset)


def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
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
) -> tuple[Tensor | None, ...]:
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
) -> tuple[Tensor | None, ...]:
    return _backward(
        False,
        grad_output,
        grad_new_residual,
        new_residual,
        normalized_shape,
        weight,
        None,
        eps,
        weight_offset,
        (*needs, False),
    )[:2]


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
) -> tuple[Tensor | None, ...]:
    return _backward(
        True,
        grad_output,
        grad_new_residual,
        new_residual,
        normalized_shape,
        weight,
        bias,
        eps,
        weight_offset,
        needs,
    )


_SUPPORTS = refusals(("cuda",), any_params=False)
BACKENDS: dict[str, Backend] = {
    op.__name__: Backend("cuda", op, backward, _SUPPORTS[op.__name__], available)
    for op, backward in (
        (rms_norm, rms_norm_backward),
        (layer_norm, layer_norm_backward),
        (add_rms_norm, add_rms_norm_backward),
        (add_layer_norm, add_layer_norm_backward),
    )
}
