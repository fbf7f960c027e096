"""Adam and AdamW in one fused call (Kingma and Ba, 2014; Loshchilov and Hutter, 2017)."""

from typing import Any

import torch

from fastllm.optim.base import Fused
from fastllm.optim.settings import ADAM, Settings

EXTRAS = """
    state_dtype          "fp32"; "bf16", "int8" or "fp8": moments in fewer bytes (see
                         fastllm.optim.states). Tensors of less than 4096 elements keep float32.
                         float64 and complex parameters keep moments of their own dtype. Moments of
                         bfloat16 and float16 parameters are float32 here where torch's are not.
    master_weights       keep a float32 copy of bfloat16 and float16 parameters (`master_param` in
                         the state), so that small steps add up
    stochastic_rounding  round bfloat16 parameters up or down at random, without bias
    max_grad_norm        clip all gradients to this total norm within the step; the gradients
                         themselves stay as they are, `optimizer.grad_norm` is the norm found
    seed                 of the random numbers; with the same seed a run repeats itself bit by bit

    float32 states are torch's: a run can go on with either optimizer from the other's state_dict.
    Raises ValueError for settings out of range, RuntimeError for sparse gradients.
"""


class _Adam(Fused):
    kind = ADAM
    places = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.places if group["amsgrad"] else self.places[:2]

    def settings(self, group: dict[str, Any], factor: float) -> Settings:
        one, two = group["betas"]
        return Settings(
            float(group["lr"]), float(one), float(two), group["eps"], float(group["weight_decay"]),
            group["decoupled_weight_decay"], False, factor, self.stochastic_rounding, self.seed,
        )  # fmt: skip


class Adam(_Adam, torch.optim.Adam):
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        state_dtype: str = "fp32",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.options(state_dtype, master_weights, stochastic_rounding, max_grad_norm, seed)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)


class AdamW(_Adam, torch.optim.AdamW):
    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        state_dtype: str = "fp32",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.options(state_dtype, master_weights, stochastic_rounding, max_grad_norm, seed)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **kwargs)


_SAME = "in one call for all tensors; arguments as torch's, and:\n"
Adam.__doc__ = f"torch.optim.Adam {_SAME}{EXTRAS}"
AdamW.__doc__ = f"torch.optim.AdamW {_SAME}{EXTRAS}"
