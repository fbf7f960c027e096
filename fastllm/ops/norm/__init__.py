"""layer_norm, rms_norm, their residual-add forms, group_norm: fused forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import Op
from fastllm.ops.norm import cpu, cuda, reference, spec, stock, triton
from fastllm.ops.norm.cases import cases

TABLES = (cpu.BACKENDS, triton.BACKENDS, cuda.BACKENDS, stock.BACKENDS)


def _sum(args: tuple, outputs: tuple) -> tuple:
    """The residual forms keep the sum, not its two terms."""
    return (outputs[1], *args[2:])


def _twice(saved: tuple) -> tuple:
    """Forward arguments again from what _sum kept: the sum stands for both of its terms."""
    return (saved[0], *saved)


def _register(name: str, **facts: Any) -> Op:
    """The op `name`: what its name settles, and the facts that are its own."""
    backends = [table[name] for table in TABLES if name in table]
    facts.update(family="norm", schema=spec.SCHEMAS[name], cases=cases(name))
    return define(name, backends, reference, **facts)


rms_norm_op = _register(
    "rms_norm",
    tensors=(0, 2),
    saved_tensors=(0, 2),
    gradients={0: 0, 2: 1},
    check=spec.check_rms,
    fake=spec.fake_norm,
    fake_backward=spec.fake_rms_backward,
    cost=spec.cost_norm,
    autocast={"cuda": torch.float32},
)
layer_norm_op = _register(
    "layer_norm",
    tensors=(0, 2, 3),
    saved_tensors=(0, 2, 3),
    gradients={0: 0, 2: 1, 3: 2},
    check=spec.check_layer,
    fake=spec.fake_norm,
    fake_backward=spec.fake_layer_backward,
    cost=spec.cost_norm,
    autocast={"cuda": torch.float32},
)
add_rms_norm_op = _register(
    "add_rms_norm",
    tensors=(0, 1, 3),
    saved=_sum,
    saved_tensors=(0, 2),
    gradients={0: 0, 1: 0, 3: 1},
    outputs=2,
    forward_args=_twice,
    check=spec.check_add_rms,
    fake=spec.fake_add_norm,
    fake_backward=spec.fake_rms_backward,
    cost=spec.cost_add_norm,
    autocast_composite=("cuda",),
)
add_layer_norm_op = _register(
    "add_layer_norm",
    tensors=(0, 1, 3, 4),
    saved=_sum,
    saved_tensors=(0, 2, 3),
    gradients={0: 0, 1: 0, 3: 1, 4: 2},
    outputs=2,
    forward_args=_twice,
    check=spec.check_add_layer,
    fake=spec.fake_add_norm,
    fake_backward=spec.fake_layer_backward,
    cost=spec.cost_add_norm,
    autocast_composite=("cuda",),
)
group_norm_op = _register(
    "group_norm",
    tensors=(0, 2, 3),
    saved_tensors=(0, 2, 3),
    gradients={0: 0, 2: 1, 3: 2},
    check=spec.check_group,
    fake=spec.fake_norm,
    fake_backward=spec.fake_layer_backward,
    cost=spec.cost_norm,
    autocast={"cuda": torch.float32},
)


def rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Root mean square normalization: x / sqrt(mean(x^2) + eps) * (weight + weight_offset).

    As torch.nn.functional.rms_norm, with Gemma's `weight_offset=1.0` (Zhang & Sennrich 2019).

    input             [*, *normalized_shape], any float dtype; computed in float32, rounded once
    normalized_shape  an int or the sizes of the last dimensions
    weight            [*normalized_shape] or None; its dtype may differ from input's
    eps               None: machine epsilon of the dtype that is computed in
    backend           forces one of fastllm's backends for this call

    Returns a tensor with input's shape and dtype. Raises ValueError or TypeError for arguments that
    do not fit, fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    if eps is None:
        eps = spec.default_eps(input)
    if type(normalized_shape) is not tuple:
        normalized_shape = spec.as_shape(normalized_shape)
    return rms_norm_op(input, normalized_shape, weight, eps, weight_offset, backend=backend)


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Layer normalization: (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias.

    As torch.nn.functional.layer_norm (Ba et al. 2016); `weight_offset=1.0` is layernorm1p.
    Arguments, result and errors as for `rms_norm`; bias has the shape of weight.
    """
    if type(normalized_shape) is not tuple:
        normalized_shape = spec.as_shape(normalized_shape)
    return layer_norm_op(input, normalized_shape, weight, bias, eps, weight_offset, backend=backend)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and rms_norm of the sum in one pass.

    Returns (output, new_residual): new_residual = input + residual, rounded as torch would, and
    output = rms_norm(new_residual, ...). `residual` has input's shape; the rest as `rms_norm`.
    """
    if eps is None:
        eps = spec.default_eps(input)
    if type(normalized_shape) is not tuple:
        normalized_shape = spec.as_shape(normalized_shape)
    return add_rms_norm_op(
        input, residual, normalized_shape, weight, eps, weight_offset, backend=backend
    )


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual addition and layer_norm of the sum in one pass.

    Returns (output, new_residual) as `add_rms_norm` does; the rest as `layer_norm`.
    """
    if type(normalized_shape) is not tuple:
        normalized_shape = spec.as_shape(normalized_shape)
    return add_layer_norm_op(
        input, residual, normalized_shape, weight, bias, eps, weight_offset, backend=backend
    )


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Group normalization over channels (Wu & He 2018), as torch.nn.functional.group_norm.

    input [N, C, *], weight and bias [C]; num_groups divides C. Result and errors as for `rms_norm`.
    """
    return group_norm_op(input, num_groups, weight, bias, eps, backend=backend)
