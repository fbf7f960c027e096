"""SGD with momentum and Nesterov's form of it, in one fused call."""

from typing import Any

import torch

from fastllm.optim.adam import EXTRAS
from fastllm.optim.base import Fused
from fastllm.optim.settings import SGD as KIND
from fastllm.optim.settings import Settings


class SGD(Fused, torch.optim.SGD):
    kind = KIND
    places = ("momentum_buffer",)
    counted = False

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Any = 0,
        nesterov: bool = False,
        *,
        state_dtype: str = "fp32",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.options(state_dtype, master_weights, stochastic_rounding, max_grad_norm, seed)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **kwargs)
        self._step_supports_amp_scaling = True

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.places if group["momentum"] else ()

    def settings(self, group: dict[str, Any], factor: float) -> Settings:
        return Settings(
            float(group["lr"]), group["momentum"], group["dampening"], 0.0,
            float(group["weight_decay"]), False, group["nesterov"], factor,
            self.stochastic_rounding, self.seed,
        )  # fmt: skip


SGD.__doc__ = f"torch.optim.SGD in one call for all tensors; arguments as torch's, and:\n{EXTRAS}"
