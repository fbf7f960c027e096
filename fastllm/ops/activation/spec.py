"""What the activations take: schemas, checks, shapes of results, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

UNARY = ("silu", "gelu", "relu2")
GATED = ("swiglu", "geglu")
APPROXIMATE = ("gelu", "geglu")  # these take `approximate`


def schema(name: str) -> Schema:
    """The dispatcher's view: one input, or a gate and an up."""
    inputs = "Tensor gate, Tensor up" if name in GATED else "Tensor input"
    params = inputs + (", str approximate" if name in APPROXIMATE else "")
    grads = "(Tensor, Tensor)" if name in GATED else "Tensor"
    return Schema(params, "Tensor", f"Tensor grad_output, {params}", grads)


# ---- arguments


def check_unary(input: Tensor, approximate: str = "none") -> None:
    """TypeError or ValueError that names the argument."""
    if not (isinstance(input, Tensor) and input.is_floating_point()):
        raise _not_float("input", input)
    _check_approximate(approximate)


def check_gated(gate: Tensor, up: Tensor, approximate: str = "none") -> None:
    """TypeError or ValueError that names the argument."""
    for name, tensor in (("gate", gate), ("up", up)):
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
            raise _not_float(name, tensor)
    if gate.shape != up.shape or gate.device != up.device:
        raise ValueError(
            f"up: expected the shape and device of gate ({describe(gate)}), found {describe(up)}"
        )
    _check_approximate(approximate)


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', found {approximate!r}")


def _not_float(name: str, value: Any) -> TypeError:
    found = describe(value) if isinstance(value, Tensor) else type(value).__name__
    return TypeError(f"{name}: expected a floating point Tensor, found {found}")


# ---- fake kernels


def fake_unary(input: Tensor, *_: Any) -> Tensor:
    """One output like the input, contiguous."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def fake_gated(gate: Tensor, up: Tensor, *_: Any) -> Tensor:
    """One output in the dtype of the product."""
    dtype = torch.result_type(gate, up)
    return torch.empty_like(gate, dtype=dtype, memory_format=torch.contiguous_format)


def fake_unary_backward(input: Tensor, *_: Any) -> tuple[Tensor]:
    """The gradient of input."""
    return (fake_unary(input),)


def fake_gated_backward(gate: Tensor, up: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return fake_unary(gate), fake_unary(up)


# ---- costs


def cost_unary(input: Tensor, *_: Any) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(2 * size, 3 * size, 10 * n, 20 * n)


def cost_gated(gate: Tensor, *_: Any) -> Cost:
    """Forward reads two and writes one; backward reads three and writes two."""
    size, n = gate.numel() * gate.element_size(), gate.numel()
    return Cost(3 * size, 5 * size, 12 * n, 25 * n)
