"""Normalization in plain torch: any float dtype, differentiable, in float64 the oracle.

Low precision is computed in float32 and rounded once at the end.
Layer normalization: Ba et al. 2016; RMS: Zhang & Sennrich 2019; group: Wu & He 2018.
"""

import torch
from torch import Tensor

Shape = tuple[int, ...]


def rms_norm(
    input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float, weight_offset: float
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)"""
    x, dims = _wide(input), _dims(normalized_shape)
    y = x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
    return _affine(y, weight, None, weight_offset).to(input.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float,
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias"""
    y = _standardized(_wide(input), _dims(normalized_shape), eps)[0]
    return _affine(y, weight, bias, weight_offset).to(input.dtype)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """h = input + residual, rounded; rms_norm(h), h"""
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
    """h = input + residual, rounded; layer_norm(h), h"""
    h = input + residual
    return layer_norm(h, normalized_shape, weight, bias, eps, weight_offset), h


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Each group of channels of each sample is standardized, then scaled and shifted by channel."""
    y = _standardized(_grouped(_wide(input), num_groups), (2,), eps)[0].reshape(input.shape)
    per_channel = (1, -1, *[1] * (input.dim() - 2))
    weight = None if weight is None else weight.reshape(per_channel)
    bias = None if bias is None else bias.reshape(per_channel)
    return _affine(y, weight, bias, 0.0).to(input.dtype)


def rms_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    normalized_shape: Shape,
    weight: Tensor | None,
    eps: float,
    weight_offset: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx = r (g - x r^2 mean(g x)), dw = sum(dy x r), with r = 1 / rms(x), g = dy (w + offset)"""
    x, dy, dims = _wide(input), _wide(grad_output, input), _dims(normalized_shape)
    r = torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + eps)
    g = _affine(dy, weight, None, weight_offset)
    dx = r * (g - x * r.pow(2) * (g * x).mean(dims, keepdim=True))
    lead = tuple(range(x.dim() - len(dims)))
    return (
        dx.to(input.dtype) if needs[0] else None,
        _summed(dy * (x * r), lead, weight) if needs[1] else None,
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
    """dx = r (g - mean(g) - n mean(g n)), dw = sum(dy n), db = sum(dy); n is standardized x"""
    x, dy, dims = _wide(input), _wide(grad_output, input), _dims(normalized_shape)
    n, r = _standardized(x, dims, eps)
    dx = _standardized_backward(_affine(dy, weight, None, weight_offset), n, r, dims)
    lead = tuple(range(x.dim() - len(dims)))
    return (
        dx.to(input.dtype) if needs[0] else None,
        _summed(dy * n, lead, weight) if needs[1] else None,
        _summed(dy, lead, bias) if needs[2] else None,
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
    """The gradient of the sum is that of the norm plus the one that arrives at new_residual."""
    dx, dw = rms_norm_backward(
        grad_output, new_residual, normalized_shape, weight, eps, weight_offset, needs
    )
    return _plus(dx, grad_new_residual), dw


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
    """The gradient of the sum is that of the norm plus the one that arrives at new_residual."""
    dx, dw, db = layer_norm_backward(
        grad_output, new_residual, normalized_shape, weight, bias, eps, weight_offset, needs
    )
    return _plus(dx, grad_new_residual), dw, db


def group_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As layer_norm_backward within each group; weight and bias gradients by channel."""
    x, dy = _wide(input), _wide(grad_output, input)
    per_channel = (1, -1, *[1] * (input.dim() - 2))
    g = dy if weight is None else dy * weight.to(dy.dtype).reshape(per_channel)
    n, r = _standardized(_grouped(x, num_groups), (2,), eps)
    dx = _standardized_backward(_grouped(g, num_groups), n, r, (2,)).reshape(input.shape)
    lead = (0, *range(2, input.dim()))
    return (
        dx.to(input.dtype) if needs[0] else None,
        _summed(dy * n.reshape(input.shape), lead, weight) if needs[1] else None,
        _summed(dy, lead, bias) if needs[2] else None,
    )


def _wide(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """At least float32; with `like`, at least the precision that `like` is computed in."""
    dtype = torch.promote_types((like if like is not None else tensor).dtype, torch.float32)
    return tensor.to(dtype)


def _dims(normalized_shape: Shape) -> Shape:
    return tuple(range(-len(normalized_shape), 0))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, offset: float) -> Tensor:
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y if bias is None else y + bias.to(y.dtype)


def _grouped(x: Tensor, num_groups: int) -> Tensor:
    """[N, C, *] as [N, G, C/G * prod(*)]"""
    return x.reshape(x.shape[0], num_groups, x[0].numel() // num_groups if x.shape[0] else 0)


def _standardized(x: Tensor, dims: Shape, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / std and 1 / std, over `dims`"""
    centered = x - x.mean(dims, keepdim=True)
    r = torch.rsqrt(centered.pow(2).mean(dims, keepdim=True) + eps)
    return centered * r, r


def _standardized_backward(g: Tensor, n: Tensor, r: Tensor, dims: Shape) -> Tensor:
    return r * (g - g.mean(dims, keepdim=True) - n * (g * n).mean(dims, keepdim=True))


def _summed(terms: Tensor, dims: Shape, like: Tensor | None) -> Tensor | None:
    if like is None:
        return None
    return (terms.sum(dims) if dims else terms).to(like.dtype)


def _plus(grad: Tensor | None, other: Tensor | None) -> Tensor | None:
    return grad if grad is None or other is None else grad + other
