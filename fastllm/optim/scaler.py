"""Dynamic loss scaling (Micikevicius et al., 2017) that costs one read of the gradients."""

import math
from typing import Any

import torch

from fastllm.optim.base import Fused
from fastllm.optim.grads import norm_of


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler; for fastllm's optimizers on the CPU, one pass finds inf, NaN and norm.

    The optimizer's step then unscales, clips to its `max_grad_norm` and updates in a second pass,
    where torch takes three: unscale_, clip_grad_norm_ and step. Everything else is torch's, as are
    other optimizers and devices. On the CPU construct it with `device="cpu"`.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        params = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        scale: Any = self._scale
        here = scale is not None and all(p.is_cpu for p in params)
        if not isinstance(optimizer, Fused) or not here:
            return super()._check_inf_per_device(optimizer)  # type: ignore[misc]
        norm, largest = norm_of([p.grad for p in params])
        found = torch.full((), float(not math.isfinite(largest)), device=scale.device)
        if optimizer.max_grad_norm is not None:
            optimizer.measured_norm = norm
        state = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {scale.device: found}
        return state["found_inf_per_device"]
