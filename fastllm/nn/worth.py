"""Where a module takes fastllm's products instead of calling torch itself."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.op import OPS
from fastllm.ops.matmul import worth as products

# results, from which a pass over memory that is saved pays for the way to the kernel
PASS = 1 << 18


def worth(input: Any, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether fastllm's linear runs on anything but torch here: as measured, else as is likely.

    False for what only torch takes: nested tensors, the proxies of torch.fx, mixed dtypes.
    """
    if not isinstance(input, Tensor) or input.is_nested:
        return False
    kind, dtype = input.device.type, input.dtype
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        return False
    elif not torch.compiler.is_compiling():
        op = OPS["linear"]
        found = op.routes.find((input, weight, bias, None, None))
        if found:
            return found[0].name != "torch"
    if kind != "cpu":
        return False
    rows = input.numel() // max(1, input.shape[-1])
    return products.worth(rows, weight.shape[1], weight.shape[0], dtype)


def worth_a_pass(input: Any, width: int) -> bool:
    """Whether fusing what is around a product with `width` columns pays."""
    if not isinstance(input, Tensor) or input.is_nested:
        return False
    if torch.compiler.is_compiling():
        return True
    return input.numel() * width >= PASS * input.shape[-1]
