"""What autocast makes of a call's arguments, for functions that torch would cast."""

from typing import Any

import torch
from torch import Tensor

_LOWERED = frozenset((torch.float32, torch.float16, torch.bfloat16))


def casting(input: Any) -> str | None:
    """The device type for which autocast is on, if input is there."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    kind = input.device.type if isinstance(input, Tensor) else None
    on = kind in ("cpu", "cuda", "xpu") and torch.is_autocast_enabled(kind)
    return kind if on else None


def cast(kind: str, *tensors: Any) -> tuple:
    """The tensors in autocast's dtype; float64, integers and None as they are."""
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.dtype in _LOWERED else t for t in tensors
    )
