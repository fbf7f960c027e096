"""The matmul family in plain torch: any float dtype, differentiable, in float64 the oracle."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor | None, ...]


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """y = act(x W^T + b) + residual"""
    z = _pre(input, weight, bias)
    return _finish(z, residual, activation).to(input.dtype)


def linear_pre(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """(y, z) with z = x W^T + b, y = act(z) + residual"""
    z = _pre(input, weight, bias)
    y = _finish(z, residual, activation)
    return (y.clone() if y is z else y).to(input.dtype), z.to(input.dtype)


def gated_linear(input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str) -> Tensor:
    """act(x Wg^T) * (x Wu^T)"""
    return gated_linear_pre(input, weight_gate, weight_up, activation)[0]


def gated_linear_pre(
    input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, u) with g = x Wg^T, u = x Wu^T, y = act(g) * u"""
    gate, up = _pre(input, weight_gate, None), _pre(input, weight_up, None)
    y = activate(gate, activation) * up
    return y.to(input.dtype), gate.to(input.dtype), up.to(input.dtype)


def matmul(input: Tensor, other: Tensor) -> Tensor:
    """torch.matmul"""
    return torch.matmul(_wide(input), _wide(other)).to(input.dtype)


def linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    needs: tuple[bool, ...],
) -> Grads:
    """dz = dy act'(z); dx = dz W, dW = dz^T x, db = sum(dz), dresidual = dy"""
    z = None if activation is None else _pre(input, weight, bias)
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
    """As linear_backward from the kept z, plus the gradient that arrives there.

    z is computed again here: a function of the inputs can be differentiated once more.
    """
    z = _pre(input, weight, bias) if torch.is_grad_enabled() else _wide(pre)
    return _linear_backward(grad_output, grad_pre, input, weight, bias, z, activation, needs)


def gated_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    activation: str,
    needs: tuple[bool, ...],
) -> Grads:
    """dg = dy u act'(g), du = dy act(g); dx = dg Wg + du Wu, dWg = dg^T x, dWu = du^T x"""
    gate, up = _pre(input, weight_gate, None), _pre(input, weight_up, None)
    return _gated_backward(
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
    """As gated_linear_backward from the kept products, plus the gradients that arrive there."""
    if torch.is_grad_enabled():
        gate, up = _pre(input, weight_gate, None), _pre(input, weight_up, None)
    gate, up = _wide(gate), _wide(up)
    return _gated_backward(
        grad_output, grad_gate, grad_up, input, weight_gate, weight_up, gate, up, activation, needs
    )


def matmul_backward(
    grad_output: Tensor, input: Tensor, other: Tensor, needs: tuple[bool, ...]
) -> Grads:
    """dA = dY B^T, dB = A^T dY, summed over what was broadcast; vectors are thin matrices"""
    dy, a, b = _wide(grad_output), _wide(input), _wide(other)
    if other.dim() == 1:
        b, dy = b.unsqueeze(-1), dy.unsqueeze(-1)
    if input.dim() == 1:
        a, dy = a.unsqueeze(0), dy.unsqueeze(-2)
    da = torch.matmul(dy, b.mT).sum_to_size(a.shape) if needs[0] else None
    db = torch.matmul(a.mT, dy).sum_to_size(b.shape) if needs[1] else None
    return (
        None if da is None else da.reshape(input.shape).to(input.dtype),
        None if db is None else db.reshape(other.shape).to(other.dtype),
    )


def activate(z: Tensor, activation: str | None) -> Tensor:
    """The activation of that name."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    if activation == "relu":
        return F.relu(z)
    if activation == "relu2":
        return F.relu(z).square()
    return z


def derivative(z: Tensor, activation: str | None) -> Tensor:
    """The activation's derivative, written out so that it can be differentiated again."""
    if activation == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    if activation == "gelu_tanh":
        root = math.sqrt(2.0 / math.pi)
        t = torch.tanh(root * (z + 0.044715 * z**3))
        return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * root * (1.0 + 3 * 0.044715 * z * z)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "relu2":
        return 2.0 * F.relu(z)
    return torch.ones_like(z)


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
    dy = _wide(grad_output)
    dz = dy if z is None or activation is None else dy * derivative(z, activation)
    dz = dz if grad_pre is None else dz + _wide(grad_pre)
    dx, dw = _products(dz, input, (weight, needs[0]), needs[1])
    db = _rows(dz).sum(0).to(bias.dtype) if needs[2] and bias is not None else None
    residual = grad_output.clone() if needs[3] else None
    return None if dx is None else dx.to(input.dtype), dw, db, residual


def _gated_backward(
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
    dy = _wide(grad_output)
    dgate, dup = dy * up * derivative(gate, activation), dy * activate(gate, activation)
    dgate = dgate if grad_gate is None else dgate + _wide(grad_gate)
    dup = dup if grad_up is None else dup + _wide(grad_up)
    dx, dwg = _products(dgate, input, (weight_gate, needs[0]), needs[1])
    more, dwu = _products(dup, input, (weight_up, needs[0]), needs[2])
    if dx is not None and more is not None:
        dx = (dx + more).to(input.dtype)
    return dx, dwg, dwu


def _products(
    dz: Tensor, input: Tensor, weight: tuple[Tensor, bool], need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dz W, in the dtype that is computed in, and dz^T x"""
    dx = dz @ _wide(weight[0]) if weight[1] else None
    dw = (_rows(dz).mT @ _rows(_wide(input))).to(input.dtype) if need_weight else None
    return dx, dw


def _rows(x: Tensor) -> Tensor:
    """[*, K] as a matrix"""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _pre(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = _wide(input) @ _wide(weight).mT
    return z if bias is None else z + _wide(bias)


def _finish(z: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = activate(z, activation)
    return y if residual is None else y + _wide(residual)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
