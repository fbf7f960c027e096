"""The contract of linear_cross_entropy."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.ops.loss.spec import check_options, require_float

_TENSORS = "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight"
_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, "
    "float logit_scale, int chunk_bytes, bool save_gradient"
)
SCHEMA = Schema(
    params=f"{_TENSORS}, {_OPTIONS}",
    returns="(Tensor, Tensor)",
    backward_params=f"Tensor grad_loss, {_TENSORS}, Tensor lse, Tensor? gradient, {_OPTIONS}",
    backward_returns="(Tensor, Tensor, Tensor)",
)


def check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int,
    save_gradient: bool,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    require_float("input", input)
    require_float("weight", weight)
    if input.dim() != 2:
        raise ValueError(f"input: expected [tokens, features], found {list(input.shape)}")
    if weight.dim() != 2 or weight.shape[1] != input.shape[1] or weight.dtype != input.dtype:
        raise ValueError(
            f"weight: expected [classes, {input.shape[1]}] of input's dtype ({describe(input)}), "
            f"found {describe(weight)}"
        )
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        found = describe(target) if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: expected an int64 Tensor of class indices, found {found}")
    if target.shape != input.shape[:1]:
        raise ValueError(f"target: expected shape [{input.shape[0]}], found {list(target.shape)}")
    for name, tensor in (("bias", bias), ("class_weight", class_weight)):
        if tensor is None:
            continue
        require_float(name, tensor)
        if tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}: expected shape [{weight.shape[0]}], found {list(tensor.shape)}"
            )
    if bias is not None and bias.dtype != input.dtype:
        raise ValueError(f"bias: expected input's dtype {input.dtype}, found {bias.dtype}")
    check_options(reduction, label_smoothing, softcap)
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected 1 or more, found {chunk_bytes}")


def fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """The loss, [tokens] or a scalar, and the tokens' log-sum-exp in float64."""
    rows = input.shape[0]
    loss = input.new_empty((rows,) if reduction == "none" else ())
    return loss, input.new_empty((rows,), dtype=torch.float64)


def fake_backward(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias."""
    wanted = (input, weight, bias)
    return tuple(
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in wanted
    )


def cost(input: Tensor, weight: Tensor, *_: Any) -> Cost:
    """One product forward, two backward; input, weight and their gradients move once."""
    size = (input.numel() + weight.numel()) * input.element_size()
    flops = 2 * input.shape[0] * weight.numel()
    return Cost(size, 2 * size, flops, 2 * flops)
