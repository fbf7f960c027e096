"""Lion: the sign of an interpolated momentum (Chen et al., 2023), in one fused call."""

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastllm.optim.adam import EXTRAS
from fastllm.optim.base import Fused
from fastllm.optim.settings import LION, Settings


class Lion(Fused, Optimizer):
    kind = LION
    places = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        state_dtype: str = "fp32",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}: expected 0 or more, found {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, found {beta}")
        self.options(state_dtype, master_weights, stochastic_rounding, max_grad_norm, seed)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def not_torch(self) -> str | None:
        return "torch has no Lion"

    def settings(self, group: dict[str, Any], factor: float) -> Settings:
        one, two = group["betas"]
        return Settings(
            float(group["lr"]), one, two, 0.0, group["weight_decay"], True, False, factor,
            self.stochastic_rounding, self.seed,
        )  # fmt: skip


Lion.__doc__ = f"""Lion (Chen et al., 2023) in one call for all tensors.

    p <- p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g), m <- beta2 m + (1 - beta2) g

    lr, betas, weight_decay (decoupled), maximize: as in torch's optimizers, and:
{EXTRAS}"""
