"""LAMB (You et al., 2020): Adam's direction, at a length in proportion to each tensor's own."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastllm.optim.adam import EXTRAS
from fastllm.optim.directed import Directed, Way, computed, norms, wide
from fastllm.optim.settings import ADAM, Settings
from fastllm.optim.work import Work, run


class LAMB(Directed, Optimizer):
    kind = ADAM
    places = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        state_dtype: str = "fp32",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"{name}: expected 0 or more, found {value}")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{i}]: expected 0 <= beta < 1, found {beta}")
        self.options(state_dtype, master_weights, stochastic_rounding, max_grad_norm, seed)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, defaults)

    def not_torch(self) -> str | None:
        return "torch has no LAMB"

    def settings(self, group: dict[str, Any], factor: float) -> Settings:
        one, two = group["betas"]
        return Settings(
            float(group["lr"]), one, two, group["eps"], group["weight_decay"], True, False, factor,
            self.stochastic_rounding, self.seed,
        )  # fmt: skip

    def ways(self, work: Work, backend: str | None) -> list[Way]:
        s, params = work.settings, wide(work)
        # Adam's step of size 1 from -decay p ends at minus the direction
        ends = [p.to(computed(p), copy=True) for p in params]
        torch._foreach_mul_(ends, -s.weight_decay)
        adam = s._replace(lr=1.0, weight_decay=0.0, stochastic=False)
        run(ADAM, [work._replace(settings=adam, params=ends, masters=None)], backend)
        lengths = zip(ends, norms(params), norms(ends), strict=True)
        return [Way(end, -s.lr * (p / u if p > 0 and u > 0 else 1.0)) for end, p, u in lengths]

    def on_device(
        self, works: list[Work], scale: Any, found: Any, max_norm: float | None, kernels: Any
    ) -> Tensor | None:
        adams, alongs, sizes = [], [], []
        for work in works:
            s, params = work.settings, wide(work)
            ends = [p.to(computed(p), copy=True) for p in params]
            torch._foreach_mul_(ends, -s.weight_decay)
            adam = s._replace(lr=1.0, weight_decay=0.0, stochastic=False)
            adams.append(work._replace(settings=adam, params=ends, masters=None))
            along = Settings(-s.lr, stochastic=s.stochastic, seed=s.seed)
            alongs.append(work._replace(settings=along, grads=ends, states=[], scales=[]))
        norm = kernels.run_works(ADAM, adams, scale, found, max_norm)
        for work in alongs:
            p, u = (
                torch.stack(torch._foreach_norm(ts, dtype=torch.float32))
                for ts in (wide(work), work.grads)
            )
            sizes.append(torch.where((p > 0) & (u > 0), p / u, torch.ones_like(u)))
        kernels.run_along(alongs, sizes, found)
        return norm  # type: ignore[no-any-return]


LAMB.__doc__ = f"""LAMB (You et al., 2020) in three fused passes over all tensors.

    u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay p
    p <- p - lr (|p| / |u|) u, with the 2-norms of each tensor; their ratio is 1 where one is 0

    lr, betas, eps, weight_decay, maximize: as in torch's optimizers, and:
{EXTRAS}"""
