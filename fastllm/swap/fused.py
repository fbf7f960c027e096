"""What a rewritten forward calls: a residual addition and the norm after it, fused where safe."""

from typing import Any

import torch
from torch import Tensor

from fastllm.nn.hooks import observed


def add_norm(a: Any, b: Any, norm: Any) -> tuple[Any, Any]:
    """(a + b, norm(a + b)), in one kernel when nothing could tell the difference.

    Whatever `norm` is by now (restored, wrapped, hooked, replaced), its own __call__ is what runs
    then.
    """
    if (
        type(a) is type(b) is Tensor
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.device == b.device
        and getattr(type(norm), "_fastllm_recipe", None) is not None
        and not observed(norm)
        and not torch.is_autocast_enabled(a.device.type)
        and not (a.is_nested or b.is_nested)
    ):
        output, total = norm.add(a, b)
        return total, output
    total = a + b
    return total, norm(total)


def norm_of_sum(norm: Any, a: Any, b: Any) -> Any:
    """norm(a + b)."""
    return add_norm(a, b, norm)[1]
