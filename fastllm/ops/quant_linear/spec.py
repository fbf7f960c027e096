"""The contract of quant_linear: schema, checks, shapes of results, cost."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.ops.matmul.spec import check_activation
from fastllm.ops.quant import layout
from fastllm.ops.quant.spec import check_dequantize

FLOAT, DYNAMIC, STATIC = range(3)
"""What becomes of the activations: kept, or int8 with a scale a token, measured or given."""
ACTIVATIONS = {"float": FLOAT, "dynamic": DYNAMIC, "static": STATIC}

_PARAMS = (
    "Tensor input, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? act_scale, "
    "int code, int group, int activations, str? activation, float outlier_threshold"
)
SCHEMA = Schema(
    params=_PARAMS,
    returns="Tensor",
    backward_params=f"Tensor grad_output, {_PARAMS}",
    backward_returns="(Tensor, Tensor)",
)


class Terms(NamedTuple):
    """What makes the layer of an input: the op's other arguments, in order."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    act_scale: Tensor | None
    code: int
    group: int
    activations: int
    activation: str | None = None
    outlier_threshold: float = 0.0

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """What the weight is: codes, scales, zeros, code and group."""
        return self.codes, self.scales, self.zeros, self.code, self.group


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(input: Tensor, *rest: Any) -> None:
    """Raises ValueError or TypeError that names the argument."""
    codes, scales, zeros, bias, act_scale, code, group, activations, activation, threshold = rest
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, found {type(input).__name__}")
    if input.dtype not in FLOATS:
        raise TypeError(f"input: expected a floating point tensor, found {describe(input)}")
    if input.dim() < 1:
        raise ValueError("input: expected [*, K], found a tensor without dimensions")
    none = codes.new_empty(0, dtype=torch.float32) if zeros is None else zeros
    check_dequantize(codes, scales, none, code, group, input.shape[-1], input.dtype)
    if codes.dim() != 2:
        raise ValueError(f"codes: expected [N, ..], found {describe(codes)}")
    if activations not in (FLOAT, DYNAMIC, STATIC):
        raise ValueError(f"activations: expected 0, 1 or 2, found {activations!r}")
    if activations != FLOAT and code not in (layout.INT8, layout.INT4):
        kind = layout.KINDS[code]
        raise ValueError(f"activations: expected 0 for {kind} weights, found {activations}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != codes.shape[0]):
        raise ValueError(f"bias: expected [{codes.shape[0]}], found {describe(bias)}")
    if bias is not None and bias.dtype != input.dtype:
        raise ValueError(f"bias: expected {describe(input)}'s dtype, found {describe(bias)}")
    if activations != FLOAT and (act_scale is None) == (activations == STATIC):
        raise ValueError(
            f"act_scale: expected one for static activations only, found {describe(act_scale)}"
        )
    if act_scale is not None and (act_scale.numel() != 1 or not act_scale.is_floating_point()):
        raise ValueError(f"act_scale: expected one number, found {describe(act_scale)}")
    check_activation(activation, optional=True)
    if not 0 <= threshold < math.inf:
        raise ValueError(f"outlier_threshold: expected 0 or more, found {threshold}")
    if threshold and activations == FLOAT:
        raise ValueError(
            f"outlier_threshold: expected none with float activations, found {threshold}"
        )
    for name, value in (("codes", codes), ("scales", scales), ("zeros", zeros), ("bias", bias)):
        if value is not None and value.device != input.device:
            raise ValueError(f"{name}: expected it on {input.device}, found {describe(value)}")


def fake(input: Tensor, codes: Tensor, *_: Any) -> Tensor:
    """[*, N], contiguous."""
    return input.new_empty((*input.shape[:-1], codes.shape[0]))


def fake_backward(
    input: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple:
    """Gradients of input and bias, contiguous."""
    return input.new_empty(input.shape), None if bias is None else bias.new_empty(bias.shape)


def cost(input: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, *_: Any) -> Cost:
    """Codes and activations are read once, the output is written; backward reads codes again."""
    n, k = codes.shape[0], input.shape[-1]
    tokens = input.numel() // max(1, k)
    held = codes.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
    rows, flops = tokens * (n + k) * input.element_size(), 2 * tokens * n * k
    return Cost(rows + held, rows + held, flops, flops)
