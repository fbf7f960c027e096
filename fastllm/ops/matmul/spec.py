"""The matmul family's contract: schemas, argument checks, fake kernels, costs.

Ops, in the order of their resolved arguments:

    linear(input, weight, bias, residual, activation)         act(x W^T + b) + residual
    linear_pre(the same)                                      (that, x W^T + b): what training runs
    gated_linear(input, weight_gate, weight_up, activation)   act(x Wg^T) * (x Wu^T)
    gated_linear_pre(the same)                                (that, x Wg^T, x Wu^T)
    matmul(input, other)                                      torch.matmul, batches broadcast

The forms with `_pre` also return what backward needs and no more; the public functions pick them
when an activation and a gradient meet. Without it, backward computes the products again.
Products and epilogues are computed in float32 (float64 in float64) and rounded once.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "relu2")
"""x * Phi(x), its tanh form, x * sigmoid(x), max(x, 0), max(x, 0)^2."""


# ---- schemas

_LINEAR = "Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str? activation"
_LINEAR_SAVED = "Tensor input, Tensor weight, Tensor? bias"
_GATED = "Tensor input, Tensor weight_gate, Tensor weight_up, str activation"
_GATED_SAVED = "Tensor input, Tensor weight_gate, Tensor weight_up"
_TWO, _THREE, _FOUR = (f"({', '.join(['Tensor'] * n)})" for n in (2, 3, 4))

SCHEMAS = {
    "linear": Schema(
        _LINEAR, "Tensor", f"Tensor grad_output, {_LINEAR_SAVED}, str? activation", _FOUR
    ),
    "linear_pre": Schema(
        _LINEAR,
        _TWO,
        f"Tensor grad_output, Tensor? grad_pre, {_LINEAR_SAVED}, Tensor pre, str? activation",
        _FOUR,
    ),
    "gated_linear": Schema(
        _GATED, "Tensor", f"Tensor grad_output, {_GATED_SAVED}, str activation", _THREE
    ),
    "gated_linear_pre": Schema(
        _GATED,
        _THREE,
        f"Tensor grad_output, Tensor? grad_gate, Tensor? grad_up, {_GATED_SAVED}, "
        "Tensor gate, Tensor up, str activation",
        _THREE,
    ),
    "matmul": Schema(
        "Tensor input, Tensor other",
        "Tensor",
        "Tensor grad_output, Tensor input, Tensor other",
        _TWO,
    ),
}


# ---- arguments


def check_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    """Raises where torch would: the message names the argument."""
    _check_product(input, weight, "weight")
    check_activation(activation, optional=True)
    n = weight.shape[0]
    if bias is not None:
        _check_like("bias", bias, input, (n,))
    if residual is not None:
        _check_like("residual", residual, input, (*input.shape[:-1], n))


def check_gated(input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str) -> None:
    """As check_linear, for two weights of one shape."""
    _check_product(input, weight_gate, "weight_gate")
    _check_like("weight_up", weight_up, input, tuple(weight_gate.shape))
    check_activation(activation, optional=False)


def check_matmul(input: Tensor, other: Tensor) -> None:
    """As torch.matmul: inner sizes agree, batch sizes broadcast."""
    for name, value in (("input", input), ("other", other)):
        _require_float(name, value)
        if value.dim() == 0:
            raise ValueError(f"{name}: expected at least 1 dimension, found {describe(value)}")
    _check_same(input, other, "other")
    inner = other.shape[-2] if other.dim() > 1 else other.shape[0]
    if input.shape[-1] != inner:
        raise ValueError(
            f"other: expected inner size {input.shape[-1]} (input is {list(input.shape)}), "
            f"found {list(other.shape)}"
        )
    try:
        torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"other: expected batch sizes that broadcast with input's {list(input.shape[:-2])}, "
            f"found {list(other.shape[:-2])}"
        ) from None


def check_activation(activation: Any, optional: bool) -> None:
    """ValueError unless it is the name of an activation (or None, where optional)."""
    if activation in ACTIVATIONS or (optional and activation is None):
        return
    names = ", ".join(ACTIVATIONS) + (" or None" if optional else "")
    raise ValueError(f"activation: expected one of {names}, found {activation!r}")


def _check_product(input: Tensor, weight: Tensor, name: str) -> None:
    _require_float("input", input)
    _require_float(name, weight)
    if input.dim() == 0:
        raise ValueError("input: expected at least 1 dimension, found 0")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{name}: expected shape [N, {input.shape[-1]}] (input is {list(input.shape)}), "
            f"found {list(weight.shape)}"
        )
    _check_same(input, weight, name)


def _check_like(name: str, value: Tensor, input: Tensor, shape: tuple[int, ...]) -> None:
    _require_float(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(value.shape)}")
    _check_same(input, value, name)


def _check_same(input: Tensor, value: Tensor, name: str) -> None:
    if value.dtype != input.dtype or value.device != input.device:
        raise ValueError(
            f"{name}: expected the dtype and device of input ({describe(input)}), "
            f"found {describe(value)}"
        )


def _require_float(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, found {describe(value)}")


# ---- fake kernels


def fake_linear(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """[*, N], contiguous."""
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def fake_linear_pre(input: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The output and the pre-activation."""
    return fake_linear(input, weight), fake_linear(input, weight)


def fake_gated_pre(input: Tensor, weight_gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output and the two products."""
    out = fake_linear(input, weight_gate)
    return out, torch.empty_like(out), torch.empty_like(out)


def fake_linear_backward(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple:
    """Gradients of input, weight, bias, residual."""
    return _plain(input), _plain(weight), _plain(bias), fake_linear(input, weight)


def fake_gated_backward(input: Tensor, weight_gate: Tensor, weight_up: Tensor, *_: Any) -> tuple:
    """Gradients of input and the two weights."""
    return _plain(input), _plain(weight_gate), _plain(weight_up)


def fake_matmul(input: Tensor, other: Tensor) -> Tensor:
    """torch.matmul's shape, contiguous."""
    batch = torch.broadcast_shapes(input.shape[:-2], other.shape[:-2])
    rows = input.shape[-2:-1]
    cols = other.shape[-1:] if other.dim() > 1 else ()
    return input.new_empty((*batch, *rows, *cols))


def fake_matmul_backward(input: Tensor, other: Tensor) -> tuple:
    """Gradients of both."""
    return _plain(input), _plain(other)


def _plain(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.new_empty(tensor.shape)


# ---- costs


def cost_linear(input: Tensor, weight: Tensor, *_: Any) -> Cost:
    """Each operand once; dX and dW are products of the same size."""
    n = weight.shape[0]
    rows = input.numel() // max(input.shape[-1], 1)
    return _cost(input.numel() + weight.numel() + rows * n, 2 * rows * weight.numel(), input)


def cost_gated(input: Tensor, weight_gate: Tensor, *_: Any) -> Cost:
    """As cost_linear, twice."""
    n = weight_gate.shape[0]
    rows = input.numel() // max(input.shape[-1], 1)
    sizes = input.numel() + 2 * weight_gate.numel() + rows * n
    return _cost(sizes, 4 * rows * weight_gate.numel(), input)


def cost_matmul(input: Tensor, other: Tensor) -> Cost:
    """As cost_linear, by batch."""
    size = prod(torch.broadcast_shapes(input.shape[:-2], other.shape[:-2]))
    rows = input.shape[-2] if input.dim() > 1 else 1
    cols = other.shape[-1] if other.dim() > 1 else 1
    sizes = input.numel() + other.numel() + size * rows * cols
    return _cost(sizes, 2 * size * rows * cols * input.shape[-1], input)


def _cost(elements: int, flops: int, like: Tensor) -> Cost:
    size = elements * like.element_size()
    return Cost(size, 2 * size, flops, 2 * flops)
