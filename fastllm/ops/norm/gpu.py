"""What the Triton and the CUDA C++ backend share: which calls they serve, and plain layouts."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
MAX_COLS = 2**30  # kernels index within a row in 32 bits


def refusals(devices: Collection[str]) -> dict[str, Callable[..., str | None]]:
    """supports() of each op for kernels that run on `devices` (torch device types)."""

    def refused(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> str | None:
        if input.device.type not in devices:
            return f"input is on {input.device.type}"
        if input.dtype not in DTYPES:
            return f"{input.dtype} input: computed by torch"
        if weight is not None:
            if weight.dtype not in DTYPES or weight.device != input.device:
                return f"{weight.dtype} weight on {weight.device} with input on {input.device}"
            if bias is not None and (bias.dtype != weight.dtype or bias.device != weight.device):
                return f"{bias.dtype} bias on {bias.device} with {weight.dtype} weight"
        elif bias is not None and (bias.dtype not in DTYPES or bias.device != input.device):
            return f"{bias.dtype} bias on {bias.device} with input on {input.device}"
        return None

    def rows(input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None = None) -> Any:
        cols = shape[0] if len(shape) == 1 else _product(shape)
        if not 0 < cols <= MAX_COLS:
            return f"rows of {cols} values"
        return refused(input, weight, bias)

    def rms(input: Tensor, shape: Shape, weight: Tensor | None, *_: Any) -> str | None:
        return rows(input, shape, weight)

    def layer(
        input: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, *_: Any
    ) -> str | None:
        return rows(input, shape, weight, bias)

    def add_rms(
        input: Tensor, residual: Tensor, shape: Shape, weight: Tensor | None, *_: Any
    ) -> str | None:
        if residual.dtype != input.dtype:
            return f"{residual.dtype} residual with {input.dtype} input"
        return rows(input, shape, weight)

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
        return refused(input, weight, bias)

    return {
        "rms_norm": rms,
        "layer_norm": layer,
        "add_rms_norm": add_rms,
        "add_layer_norm": add_layer,
        "group_norm": group,
    }


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
