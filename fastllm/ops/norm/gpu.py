"""What the Triton and the CUDA C++ backend share: which calls they serve, and plain layouts."""

from collections.abc import Callable, Collection
from typing import Any, overload

import torch
from torch import Tensor

Shape = tuple[int, ...]

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_COLS = 2**30  # kernels index within a row in 32 bits


def refusals(devices: Collection[str], any_params: bool) -> dict[str, Callable[..., str | None]]:
    """supports() of each op for kernels that run on `devices` (torch device types).

    any_params: weight and bias may have any dtype of DTYPES, else input's own or float32. These
    functions run on every call: what is usual is settled by a few cheap questions.
    """
    on_cpu = "cpu" in devices

    def usual(input: Tensor, *params: Tensor | None) -> bool:
        if not (input.is_cpu if on_cpu else input.is_cuda) or input.dtype not in DTYPES:
            return False
        index, dtype = input.get_device(), input.dtype
        for param in params:
            if param is not None and (param.dtype != dtype or param.get_device() != index):
                return False
        return True

    def explain(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
        if input.device.type not in devices:
            return f"input is on {input.device.type}"
        if input.dtype not in DTYPES:
            return f"{input.dtype} input: computed by torch"
        allowed = DTYPES if any_params else (input.dtype, torch.float32)
        for name, param in (("weight", weight), ("bias", bias)):
            if param is None:
                continue
            if param.device != input.device:
                return f"{name} on {param.device} with input on {input.device}"
            if param.dtype not in allowed:
                return f"{param.dtype} {name} with {input.dtype} input: computed by torch"
        if weight is not None and bias is not None and bias.dtype != weight.dtype:
            return f"{bias.dtype} bias with {weight.dtype} weight: computed by torch"
        return None

    def rows(input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None) -> str | None:
        cols = shape[0] if len(shape) == 1 else _product(shape)
        if not 0 < cols <= MAX_COLS:
            return f"rows of {cols} values"
        size = input.numel()
        if size >= 2**31 and size // cols >= 2**31:
            return f"{size // cols} rows"
        return None if usual(input, weight, bias) else explain(input, weight, bias)

    def rms(input: Tensor, shape: Shape, weight: Tensor | None, *_: Any) -> str | None:
        return rows(input, shape, weight, None)

    def layer(
        input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, *_: Any
    ) -> str | None:
        return rows(input, shape, weight, bias)

    def add_rms(
        input: Tensor, residual: Tensor, shape: Shape, weight: Tensor | None, *_: Any
    ) -> str | None:
        if residual.dtype != input.dtype:
            return f"{residual.dtype} residual with {input.dtype} input"
        return rows(input, shape, weight, None)

    def add_layer(
        input: Tensor,
        residual: Tensor,
        shape: Shape,
        weight: Tensor | None,
        bias: Tensor | None,
        *_: Any,
    ) -> str | None:
        if residual.dtype != input.dtype:
            return f"{residual.dtype} residual with {input.dtype} input"
        return rows(input, shape, weight, bias)

    def group(
        input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, *_: Any
    ) -> str | None:
        if input.numel() > MAX_COLS and input[0].numel() > MAX_COLS * num_groups:
            return f"groups of {input[0].numel() // num_groups} values"
        return None if usual(input, weight, bias) else explain(input, weight, bias)

    return {
        "rms_norm": rms,
        "layer_norm": layer,
        "add_rms_norm": add_rms,
        "add_layer_norm": add_layer,
        "group_norm": group,
    }


@overload
def plain(tensor: Tensor) -> Tensor: ...
@overload
def plain(tensor: None) -> None: ...
@overload
def plain(tensor: Tensor | None) -> Tensor | None: ...
def plain(tensor: Tensor | None) -> Tensor | None:
    """`tensor` in row-major layout, itself where it is."""
    return tensor if tensor is None else tensor.contiguous()


def count(shape: Shape) -> int:
    """Values that are normalized together."""
    return shape[0] if len(shape) == 1 else _product(shape)


def _product(shape: Shape) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
