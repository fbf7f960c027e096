"""Whether somebody watches a module: then it has to be called, and nothing of it fused away."""

from collections.abc import Callable
from typing import Any

from torch.nn.modules import module as hooks


def observed(module: Any, harmless: Callable[[Any], bool] | None = None) -> bool:
    """Whether somebody hooked, wrapped or compiled this very module, or hooks all modules.

    `harmless` says which forward hooks do not count.
    """
    seen = module._forward_hooks
    if seen and harmless is not None:
        seen = [h for h in seen.values() if not harmless(h)]
    return bool(
        seen
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )
