"""Stock PyTorch: the baseline, and what runs where no kernel of ours serves or wins."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.spec import require_floats

Shape = tuple[int, ...]


def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    return F.rms_norm(input, normalized_shape, _offset(weight, weight_offset), eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    weight = _ones(bias) if weight is None else _offset(weight, weight_offset)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    h = input + residual
    return rms_norm(h, normalized_shape, weight, eps, weight_offset), h


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    h = input + residual
    return layer_norm(h, normalized_shape, weight, bias, eps, weight_offset), h


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return F.group_norm(input, num_groups, _ones(bias) if weight is None else weight, bias, eps)


def refused(dtype: torch.dtype, input: Tensor, **params: Tensor | None) -> str | None:
    """Why stock layer_norm and group_norm refuse these dtypes, or None."""
    require_floats(input=input, **params)
    low_on_cpu = dtype.itemsize == 2 and input.is_cpu
    for p in params.values():
        if p is None or p.dtype == dtype or (low_on_cpu and p.dtype == torch.float32):
            continue
        return f"torch has no kernel for {dtype} input with {p.dtype} parameters"
    return None


def _ones(bias: Tensor | None) -> Tensor | None:
    """torch 2.13 fails on a bias without a weight (mixed dtypes; group_norm's backward)."""
    return None if bias is None else torch.ones_like(bias)


def _offset(weight: Tensor | None, offset: float) -> Tensor | None:
    return weight if weight is None or offset == 0.0 else weight + offset


def _rms(x: Tensor, shape: Shape, w: Tensor | None, *_: Any) -> None:
    require_floats(input=x, weight=w)


def _add_rms(x: Tensor, r: Tensor, shape: Shape, w: Tensor | None, *_: Any) -> None:
    require_floats(input=x, residual=r, weight=w)


def _layer(x: Tensor, shape: Any, w: Tensor | None, b: Tensor | None, *_: Any) -> str | None:
    return refused(x.dtype, x, weight=w, bias=b)


def _add_layer(
    x: Tensor, r: Tensor, shape: Shape, w: Tensor | None, b: Tensor | None, *_: Any
) -> str | None:
    require_floats(residual=r)
    return refused(torch.result_type(x, r), x, weight=w, bias=b)


BACKENDS: dict[str, Backend] = {
    "rms_norm": Backend("torch", rms_norm, supports=_rms),
    "layer_norm": Backend("torch", layer_norm, supports=_layer),
    "add_rms_norm": Backend("torch", add_rms_norm, supports=_add_rms),
    "add_layer_norm": Backend("torch", add_layer_norm, supports=_add_layer),
    "group_norm": Backend("torch", group_norm, supports=_layer),
}
