"""The norms in Triton: fastllm.kernels.norm and .group_norm, imported by the first call."""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import Shape, count, plain, refusals

_loaded: dict[str, ModuleType] = {}


def _kernels(name: str) -> Any:
    module = _loaded.get(name)
    if module is None:
        module = _loaded[name] = importlib.import_module(f"fastllm.kernels.{name}")
    return module


def _interpreted() -> bool:
    """Triton's interpreter was asked for: kernels then run on CPU tensors."""
    wish = os.environ.get("TRITON_INTERPRET", "").lower()
    return wish in ("1", "true", "on", "yes", "y")


def available() -> str | None:
    """Why Triton cannot run here at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _interpreted():
        return None
    if torch.cuda.is_available():
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            return "Triton needs compute capability 8.0 or later"
        return None
    if torch.xpu.is_available():
        return None
    return "no GPU that Triton compiles for"


def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    return _kernels("norm").rms_norm_fwd(
        plain(input), None, plain(weight), count(normalized_shape), eps, weight_offset
    )[0]


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    return _kernels("norm").layer_norm_fwd(
        plain(input), None, plain(weight), plain(bias), count(normalized_shape), eps, weight_offset
    )[0]


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    return _kernels("norm").rms_norm_fwd(
        plain(input), plain(residual), plain(weight), count(normalized_shape), eps, weight_offset
    )


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    return _kernels("norm").layer_norm_fwd(
        plain(input),
        plain(residual),
        plain(weight),
        plain(bias),
        count(normalized_shape),
        eps,
        weight_offset,
    )


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return _kernels("group_norm").group_norm_fwd(
        plain(input), num_groups, plain(weight), plain(bias), eps
    )


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
    return _kernels("norm").rms_norm_bwd(
        plain(grad_output),
        plain(grad_new_residual),
        plain(new_residual),
        plain(weight),
        count(normalized_shape),
        eps,
        weight_offset,
        needs,
    )


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
    return _kernels("norm").layer_norm_bwd(
        plain(grad_output),
        plain(grad_new_residual),
        plain(new_residual),
        plain(weight),
        plain(bias),
        count(normalized_shape),
        eps,
        weight_offset,
        needs,
    )


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    return _kernels("group_norm").group_norm_bwd(
        plain(grad_output), plain(input), num_groups, plain(weight), plain(bias), eps, needs
    )


_SUPPORTS = refusals(("cpu",) if _interpreted() else ("cuda", "xpu"), any_params=True)
BACKENDS: dict[str, Backend] = {
    op.__name__: Backend("triton", op, backward, _SUPPORTS[op.__name__], available)
    for op, backward in (
        (rms_norm, rms_norm_backward),
        (layer_norm, layer_norm_backward),
        (add_rms_norm, add_rms_norm_backward),
        (add_layer_norm, add_layer_norm_backward),
        (group_norm, group_norm_backward),
    )
}
