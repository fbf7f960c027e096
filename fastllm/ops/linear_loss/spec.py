"""The contract of linear_cross_entropy, and how its logits are divided."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.ops.loss.spec import Options, check_options, require_float, require_indices

_TENSORS = (
    "Tensor input, Tensor weight, Tensor target, Tensor? bias, Tensor? class_weight, "
    "Tensor? low, Tensor? up"
)
_OPTIONS = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, "
    "float logit_scale, int chunk_bytes, float skip_below, bool save_gradient"
)
SCHEMA = Schema(
    params=f"{_TENSORS}, {_OPTIONS}",
    returns="(Tensor, Tensor)",
    backward_params=f"Tensor grad_loss, {_TENSORS}, Tensor lse, Tensor? gradient, {_OPTIONS}",
    backward_returns="(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
CACHED = 4 << 20  # bytes of logits that stay in a CPU's caches
LEAST = 256  # classes of a part: fewer make thin products


class LinearOptions(NamedTuple):
    """The op's arguments after the tensors, in their order."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    chunk_bytes: int
    skip_below: float = 0.0
    save_gradient: bool = False

    @property
    def rows(self) -> Options:
        """What the kernels are asked for, token by token."""
        return Options(self.ignore_index, "none", *self[2:6])


class Plan(NamedTuple):
    """Tokens and classes of one step."""

    rows: int
    classes: int


def plan(input: Tensor, weight: Tensor, chunk_bytes: int, whole_rows: bool = False) -> Plan:
    """Steps of at most chunk_bytes of logits; on the CPU, of what its caches hold.

    With whole_rows a step has all classes, and never less than a token; else 256 classes or more.
    """
    rows, classes = max(1, input.shape[0]), max(1, weight.shape[0])
    chunk = max(1, chunk_bytes // input.element_size())
    if whole_rows:
        return Plan(min(rows, max(1, chunk // classes)), classes)
    part = min(classes, LEAST)
    block = min(rows, max(1, chunk // part))
    cached = min(chunk, CACHED // input.element_size()) if input.is_cpu else chunk
    part = min(classes, max(part, cached // block))
    count = -(-classes // part)
    even = -(-classes // count)
    return Plan(block, min(part, -(-even // 64) * 64))


def check_head(
    input: Tensor, weight: Tensor, bias: Tensor | None, who: str = "", name: str = "input"
) -> None:
    """Raises unless input [tokens, features], weight [classes, features], bias [classes] fit."""
    require_float(name, input)
    require_float(f"{who}weight", weight)
    if input.dim() != 2:
        raise ValueError(f"{name}: expected [tokens, features], found {list(input.shape)}")
    if weight.dim() != 2 or weight.shape[1] != input.shape[1] or weight.dtype != input.dtype:
        raise ValueError(
            f"{who}weight: expected [classes, {input.shape[1]}] of {name}'s dtype "
            f"({describe(input)}), found {describe(weight)}"
        )
    if bias is not None:
        _check_per_class(f"{who}bias", bias, weight.shape[0])
        if bias.dtype != input.dtype:
            raise ValueError(f"{who}bias: expected input's dtype {input.dtype}, found {bias.dtype}")


def _check_per_class(name: str, tensor: Tensor, classes: int) -> None:
    require_float(name, tensor)
    if tensor.shape != (classes,):
        raise ValueError(f"{name}: expected shape [{classes}], found {list(tensor.shape)}")


def check_low_rank(input: Tensor, weight: Tensor, low: Tensor | None, up: Tensor | None) -> None:
    """Raises unless both or neither are given, low [tokens, rank] and up [classes, rank]."""
    if low is None and up is None:
        return
    if low is None or up is None:
        raise ValueError("low and up: expected both or neither")
    for name, tensor, count in (("low", low, input.shape[0]), ("up", up, weight.shape[0])):
        require_float(name, tensor)
        if tensor.dim() != 2 or tensor.shape[0] != count or tensor.dtype != input.dtype:
            raise ValueError(
                f"{name}: expected [{count}, rank] of input's dtype {input.dtype}, "
                f"found {describe(tensor)}"
            )
    if low.shape[1] != up.shape[1]:
        raise ValueError(f"up: expected rank {low.shape[1]}, found {up.shape[1]}")


def check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    *options: Any,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    check_head(input, weight, bias)
    check_low_rank(input, weight, low, up)
    require_indices(target)
    if target.shape != input.shape[:1]:
        raise ValueError(f"target: expected shape [{input.shape[0]}], found {list(target.shape)}")
    if class_weight is not None:
        _check_per_class("class_weight", class_weight, weight.shape[0])
    o = LinearOptions(*options)
    check_options(Options(*o[:6]))
    if o.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes: expected 1 or more, found {o.chunk_bytes}")
    if not 0.0 <= o.skip_below < 1.0:
        raise ValueError(f"skip_below: expected 0 (exact) to 1, found {o.skip_below}")


def fake(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """The loss, [tokens] or a scalar, and the tokens' log-sum-exp in float64."""
    o = LinearOptions(*options)
    kind = torch.promote_types(input.dtype, torch.float32)
    loss = input.new_empty(input.shape[:1] if o.reduction == "none" else (), dtype=kind)
    return loss, input.new_empty(lse_shape(input, weight, o), dtype=torch.float64)


def lse_shape(input: Tensor, weight: Tensor, o: LinearOptions) -> tuple[int, ...]:
    """[tokens]; where parts may be skipped, one more row for each of them."""
    if not o.skip_below:
        return (input.shape[0],)
    parts = -(-weight.shape[0] // plan(input, weight, o.chunk_bytes).classes)
    return (1 + parts, input.shape[0])


def fake_backward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight, bias, low and up."""
    return tuple(
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (input, weight, bias, low, up)
    )


def cost(input: Tensor, weight: Tensor, *_: Any) -> Cost:
    """One product forward, two backward; input, weight and their gradients move once."""
    size = (input.numel() + weight.numel()) * input.element_size()
    flops = 2 * input.shape[0] * weight.numel()
    return Cost(size, 2 * size, flops, 2 * flops)
