"""The norm family's contract: schemas, argument checks, fake kernels, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe

Shape = tuple[int, ...]


# ---- schemas


def _schema(inputs: str, saved: str, params: str, outputs: int, grads: int) -> Schema:
    def tensors(count: int) -> str:
        return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"

    upstream = "Tensor grad_output" + (", Tensor? grad_new_residual" if outputs == 2 else "")
    return Schema(
        params=f"{inputs}, {params}",
        returns=tensors(outputs),
        backward_params=f"{upstream}, {saved}, {params}",
        backward_returns=tensors(grads),
    )


_SHAPE = "SymInt[] normalized_shape, Tensor? weight"
_PAIR = "Tensor input, Tensor residual"
_TAIL = "float eps, float weight_offset"
SCHEMAS = {
    "rms_norm": _schema("Tensor input", "Tensor input", f"{_SHAPE}, {_TAIL}", 1, 2),
    "layer_norm": _schema("Tensor input", "Tensor input", f"{_SHAPE}, Tensor? bias, {_TAIL}", 1, 3),
    "add_rms_norm": _schema(_PAIR, "Tensor new_residual", f"{_SHAPE}, {_TAIL}", 2, 2),
    "add_layer_norm": _schema(
        _PAIR, "Tensor new_residual", f"{_SHAPE}, Tensor? bias, {_TAIL}", 2, 3
    ),
    "group_norm": _schema(
        "Tensor input",
        "Tensor input",
        "SymInt num_groups, Tensor? weight, Tensor? bias, float eps",
        1,
        3,
    ),
}


# ---- arguments


def as_shape(normalized_shape: Any) -> Shape:
    """An int or a sequence of ints as a tuple, as torch takes it."""
    if type(normalized_shape) is tuple:
        return normalized_shape
    if isinstance(normalized_shape, int | torch.SymInt):
        return (normalized_shape,)  # type: ignore[return-value]
    try:
        return tuple(normalized_shape)
    except TypeError:
        raise TypeError(
            f"normalized_shape: expected an int or a sequence of ints, found {normalized_shape!r}"
        ) from None


def default_eps(input: Tensor) -> float:
    """torch's default for rms_norm: machine epsilon of the dtype that is computed in."""
    return _EPS.get(getattr(input, "dtype", torch.float32), 1.1920928955078125e-07)


_EPS = {torch.float64: 2.220446049250313e-16}


def check_rms(input: Tensor, shape: Shape, weight: Tensor | None, *_: Any) -> None:
    """Raises where torch would: the message names the argument."""
    if len(shape) == 1:
        if input.dim() and input.size(-1) == shape[0] and _fits(weight, shape):
            return
    elif shape and input.shape[-len(shape) :] == shape and _fits(weight, shape):
        return
    _explain(input, shape, weight=weight)


def check_layer(
    input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> None:
    """As check_rms, for bias too."""
    check_rms(input, shape, weight)
    if not _fits(bias, shape):
        _explain(input, shape, weight=weight, bias=bias)


def check_add_rms(
    input: Tensor, residual: Tensor, shape: Shape, weight: Tensor | None, *_: Any
) -> None:
    """As check_rms; `residual` has to have the shape and device of `input`."""
    _check_residual(input, residual)
    check_rms(input, shape, weight)


def check_add_layer(
    input: Tensor,
    residual: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    *_: Any,
) -> None:
    """As check_layer; `residual` has to have the shape and device of `input`."""
    _check_residual(input, residual)
    check_layer(input, shape, weight, bias)


def check_group(
    input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> None:
    """Raises where torch would: the message names the argument."""
    require_float("input", input)
    if input.dim() < 2:
        raise ValueError(
            f"input: expected at least 2 dimensions [N, C, *], found {list(input.shape)}"
        )
    channels = input.size(1)
    if num_groups <= 0 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of input's {channels} channels, found {num_groups}"
        )
    if input.numel() == num_groups:
        raise ValueError(
            f"input: expected more than 1 value in each group, found {list(input.shape)} "
            f"in {num_groups} groups"
        )
    for name, param in (("weight", weight), ("bias", bias)):
        if not _fits(param, (channels,)):
            _explain_param(name, param, input, (channels,))


def _fits(param: Tensor | None, shape: Shape) -> bool:
    if param is None:
        return True
    if len(shape) == 1:
        return param.dim() == 1 and param.size(0) == shape[0]
    return param.shape == shape


def require_float(name: str, value: Any) -> None:
    """TypeError that names the argument, unless it is a tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor, found {describe(value)}")


def require_floats(**named: Any) -> None:
    """require_float for several arguments, None let through."""
    for name, value in named.items():
        if value is not None:
            require_float(name, value)


def _check_residual(input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape or residual.device != input.device:
        require_float("residual", residual)
        raise ValueError(
            f"residual: expected the shape and device of input ({describe(input)}), "
            f"found {describe(residual)}"
        )


def _explain(input: Tensor, shape: Shape, **params: Tensor | None) -> None:
    """Finds what is wrong, once it is known that something is."""
    require_float("input", input)
    if not shape:
        raise ValueError("normalized_shape: expected at least one dimension, found ()")
    if tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape: expected the last dimensions of input {list(input.shape)}, "
            f"found {list(shape)}"
        )
    for name, param in params.items():
        if not _fits(param, shape):
            _explain_param(name, param, input, shape)


def _explain_param(name: str, param: Any, input: Tensor, shape: Shape) -> None:
    require_float(name, param)
    raise ValueError(f"{name}: expected shape {list(shape)}, found {list(param.shape)}")


# ---- fake kernels


def fake_norm(input: Tensor, *_: Any) -> Tensor:
    """One output like the input, contiguous."""
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def fake_add_norm(input: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """The output and the new residual, in the dtype of the sum."""
    dtype = torch.result_type(input, residual)
    made = [
        torch.empty_like(input, dtype=dtype, memory_format=torch.contiguous_format)
        for _ in range(2)
    ]
    return made[0], made[1]


def fake_rms_backward(input: Tensor, shape: Shape, weight: Tensor | None, *_: Any) -> tuple:
    """Gradients of input and weight."""
    return fake_norm(input), _like(weight)


def fake_layer_backward(
    input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, *_: Any
) -> tuple:
    """Gradients of input, weight and bias; group_norm has its arguments in the same places."""
    return fake_norm(input), _like(weight), _like(bias)


def _like(param: Tensor | None) -> Tensor | None:
    return None if param is None else fake_norm(param)


# ---- costs


def cost_norm(input: Tensor, *_: Any) -> Cost:
    """Forward reads x and writes y; backward reads dy and x and writes dx. Parameters are noise."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(2 * size, 3 * size, 5 * n, 10 * n)


def cost_add_norm(input: Tensor, residual: Tensor, *_: Any) -> Cost:
    """Forward reads two and writes two; backward reads dy, dh and h and writes the gradient."""
    size, n = input.numel() * input.element_size(), input.numel()
    return Cost(4 * size, 4 * size, 6 * n, 11 * n)
