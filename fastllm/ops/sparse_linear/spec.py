"""The contract of sparse_linear: schema, checks, shapes of results, cost."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.ops.sparse_linear.layout import count

FLOAT, DYNAMIC = range(2)
"""What becomes of the activations: kept, or int8 with a scale a token."""
ACTIVATIONS = {"float": FLOAT, "dynamic": DYNAMIC}

_PARAMS = "Tensor input, Tensor values, Tensor kept, Tensor? scales, Tensor? bias, int activations"
SCHEMA = Schema(
    params=_PARAMS,
    returns="Tensor",
    backward_params=f"Tensor grad_output, {_PARAMS}",
    backward_returns="(Tensor, Tensor, Tensor)",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    activations: int,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, found {type(input).__name__}")
    if input.dtype not in FLOATS:
        raise TypeError(f"input: expected a floating point tensor, found {describe(input)}")
    if input.dim() < 1:
        raise ValueError("input: expected [*, K], found a tensor without dimensions")
    k, integer = input.shape[-1], values.dtype == torch.int8
    if not integer and values.dtype != input.dtype:
        raise ValueError(f"values: expected input's dtype or int8, found {describe(values)}")
    if values.dim() != 2 or values.shape[1] != count(k):
        raise ValueError(f"values: expected [N, {count(k)}] for K = {k}, found {describe(values)}")
    n = values.shape[0]
    if kept.dtype != torch.uint8 or tuple(kept.shape) != (n, -(-k // 8)):
        raise ValueError(f"kept: expected uint8 [{n}, {-(-k // 8)}], found {describe(kept)}")
    if integer and scales is None:
        raise ValueError(f"scales: expected float32 [{n}] with int8 values, found None")
    if scales is not None and not integer:
        raise ValueError(f"values: expected int8 with scales, found {describe(values)}")
    exact = (torch.float32, torch.float64)
    if scales is not None and (tuple(scales.shape) != (n,) or scales.dtype not in exact):
        raise ValueError(f"scales: expected float32 [{n}], found {describe(scales)}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != input.dtype):
        raise ValueError(f"bias: expected [{n}] of input's dtype, found {describe(bias)}")
    if activations not in (FLOAT, DYNAMIC):
        raise ValueError(f"activations: expected 0 or 1, found {activations!r}")
    if activations == DYNAMIC and not integer:
        raise ValueError("activations: expected 0 unless values are int8, found 1")
    for name, value in (("values", values), ("kept", kept), ("scales", scales), ("bias", bias)):
        if value is not None and value.device != input.device:
            raise ValueError(f"{name}: expected it on {input.device}, found {describe(value)}")


def fake(input: Tensor, values: Tensor, *_: Any) -> Tensor:
    """[*, N], contiguous."""
    return input.new_empty((*input.shape[:-1], values.shape[0]))


def fake_backward(
    input: Tensor, values: Tensor, kept: Tensor, scales: Any, bias: Tensor | None, *_: Any
) -> tuple:
    """Gradients of input, values and bias, contiguous."""
    return (
        input.new_empty(input.shape),
        values.new_empty(values.shape) if scales is None else None,
        None if bias is None else bias.new_empty(bias.shape),
    )


def cost(
    input: Tensor, values: Tensor, kept: Tensor, scales: Tensor | None, bias: Any, *_: Any
) -> Cost:
    """The weight and the activations are read once, the output is written.

    Zeros cost no operations. Backward reads the weight again and writes its gradient.
    """
    n, k = values.shape[0], input.shape[-1]
    tokens = input.numel() // max(1, k)
    held = values.nbytes + kept.nbytes + (0 if scales is None else scales.nbytes)
    rows, flops = tokens * (n + k) * input.element_size(), tokens * n * k
    grads = values.nbytes if scales is None else 0
    return Cost(rows + held, 2 * rows + held + grads, flops, flops * (2 if grads else 1))
