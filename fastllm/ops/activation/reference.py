"""Activations in plain torch: any float dtype, differentiable, in float64 the oracle.

Low precision is computed in float32 and rounded once at the end. SiLU: Elfwing et al. 2017; GELU:
Hendrycks & Gimpel 2016; squared ReLU: So et al. 2021; the gated forms: Shazeer 2020.
"""

import math

import torch
from torch import Tensor

Needs = tuple[bool, ...]


def silu(input: Tensor) -> Tensor:
    """x sigmoid(x)"""
    return _silu(_wide(input))[0].to(input.dtype)


def gelu(input: Tensor, approximate: str) -> Tensor:
    """x P(X <= x) for a normal X, or its approximation by tanh"""
    return _gelu(_wide(input), approximate)[0].to(input.dtype)


def relu2(input: Tensor) -> Tensor:
    """max(x, 0)^2"""
    return _relu2(input)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    dtype = torch.result_type(gate, up)
    return (_silu(_wide(gate))[0] * _wide(up)).to(dtype)


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up"""
    dtype = torch.result_type(gate, up)
    return (_gelu(_wide(gate), approximate)[0] * _wide(up)).to(dtype)


def silu_backward(grad_output: Tensor, input: Tensor, needs: Needs) -> tuple[Tensor | None]:
    """dx = dy f'(x)"""
    return _unary_backward(grad_output, input, _silu(_wide(input))[1], needs)


def gelu_backward(
    grad_output: Tensor, input: Tensor, approximate: str, needs: Needs
) -> tuple[Tensor | None]:
    """dx = dy f'(x)"""
    return _unary_backward(grad_output, input, _gelu(_wide(input), approximate)[1], needs)


def relu2_backward(grad_output: Tensor, input: Tensor, needs: Needs) -> tuple[Tensor | None]:
    """dx = dy 2 max(x, 0)"""
    return _unary_backward(grad_output, input, _relu2(_wide(input))[1], needs)


def swiglu_backward(
    grad_output: Tensor, gate: Tensor, up: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """dgate = dy up f'(gate), dup = dy f(gate)"""
    return _gated_backward(grad_output, gate, up, _silu(_wide(gate)), needs)


def geglu_backward(
    grad_output: Tensor, gate: Tensor, up: Tensor, approximate: str, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """dgate = dy up f'(gate), dup = dy f(gate)"""
    return _gated_backward(grad_output, gate, up, _gelu(_wide(gate), approximate), needs)


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)"""
    s = torch.sigmoid(x)
    return x * s, s * (1 + x * torch.sigmoid(-x))


def _gelu(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)"""
    if approximate == "none":
        cumulative = 0.5 * torch.erfc(x * -math.sqrt(0.5))
        density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return x * cumulative, cumulative + x * density
    scale = 2 * math.sqrt(2 / math.pi)
    u = scale * x * (1 + 0.044715 * x * x)
    s = torch.sigmoid(u)
    return x * s, s * (1 + scale * x * (1 + 3 * 0.044715 * x * x) * torch.sigmoid(-u))


def _relu2(x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x)"""
    r = torch.relu(x)
    return r * r, 2 * r


def _unary_backward(
    grad_output: Tensor, input: Tensor, slope: Tensor, needs: Needs
) -> tuple[Tensor | None]:
    return ((_wide(grad_output, input) * slope).to(input.dtype) if needs[0] else None,)


def _gated_backward(
    grad_output: Tensor, gate: Tensor, up: Tensor, f: tuple[Tensor, Tensor], needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    dy = _wide(grad_output, gate)
    return (
        (dy * _wide(up) * f[1]).to(gate.dtype) if needs[0] else None,
        (dy * f[0]).to(up.dtype) if needs[1] else None,
    )


def _wide(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """In the dtype that is computed in: float32 at least."""
    dtype = tensor.dtype if like is None else torch.promote_types(tensor.dtype, like.dtype)
    return tensor.to(torch.promote_types(dtype, torch.float32))
