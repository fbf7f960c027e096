"""Muon (Jordan et al., 2024) as torch has it: momentum made orthogonal by Newton and Schulz."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.optim.directed import EXTRAS, Directed, Way, along, computed
from fastllm.optim.settings import SGD, Settings
from fastllm.optim.work import Work, run

BATCHED = 512 * 512  # matrices of at most as many elements go through one batched product


class Rates(NamedTuple):
    """A group's settings."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    coefficients: tuple[float, float, float]
    eps: float
    rounds: int
    adjust: str | None
    factor: float
    stochastic: bool
    seed: int


class Muon(Directed, torch.optim.Muon):
    kind = SGD
    places = ("momentum_buffer",)
    counted = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= ns_steps < 100:
            raise ValueError(f"ns_steps: expected 0 to 99, found {ns_steps}")
        if len(ns_coefficients) != 3:
            raise ValueError(f"ns_coefficients: expected three numbers, found {ns_coefficients}")
        self.options("fp32", master_weights, stochastic_rounding, max_grad_norm, seed)
        super().__init__(
            params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps,
            adjust_lr_fn,
        )  # fmt: skip
        self._step_supports_amp_scaling = True

    def settings(self, group: dict[str, Any], factor: float) -> Any:
        return Rates(
            float(group["lr"]), group["weight_decay"], group["momentum"], group["nesterov"],
            group["ns_coefficients"], group["eps"], group["ns_steps"], group["adjust_lr_fn"],
            factor, self.stochastic_rounding, self.seed,
        )  # fmt: skip

    def ways(self, work: Work, backend: str | None) -> list[Way]:
        s: Any = work.settings
        first = _momentum(work)
        run(SGD, [first], backend)
        keep = 1.0 - s.lr * s.weight_decay
        return [
            Way(o.contiguous(), s.lr * _adjusted(s.adjust, p), keep)
            for o, p in zip(_orthogonal_of(first, s), work.params, strict=True)
        ]

    def on_device(
        self, works: list[Work], scale: Any, found: Any, max_norm: float | None, kernels: Any
    ) -> Tensor | None:
        firsts = list(map(_momentum, works))
        norm = kernels.run_works(SGD, firsts, scale, found, max_norm)
        alongs, sizes = [], []
        for work, first in zip(works, firsts, strict=True):
            s: Any = work.settings
            alongs.append(along(work, _orthogonal_of(first, s), s.lr * s.weight_decay))
            own = [s.lr * _adjusted(s.adjust, p) for p in work.params]
            sizes.append(torch.tensor(own).to(work.params[0].device, non_blocking=True))
        kernels.run_along(alongs, sizes, found)
        return norm  # type: ignore[no-any-return]


def _momentum(work: Work) -> Work:
    """SGD's step of size 1 that brings the momentum up to date and ends at it, from zeros.

    Muon's momentum is SGD's of gradients times 1 - momentum, nesterov or not.
    """
    s: Any = work.settings
    ends = [
        torch.zeros_like(p, dtype=torch.bfloat16 if computed(p) == torch.float32 else computed(p))
        for p in work.params
    ]
    settings = Settings(
        -1.0, s.momentum, nesterov=s.nesterov, factor=s.factor * (1 - s.momentum), seed=s.seed
    )
    return work._replace(settings=settings, params=ends, masters=None)


def _orthogonal_of(first: Work, s: Any) -> list[Tensor]:
    return orthogonal([end.bfloat16() for end in first.params], s)


def _adjusted(rule: str | None, p: Tensor) -> float:
    """What the learning rate is multiplied by for a matrix of this shape."""
    rows, cols = p.shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1, rows / cols)) if cols else 1.0


def orthogonal(matrices: list[Tensor], s: Rates) -> list[Tensor]:
    """Matrices in bfloat16 with their singular values brought near to 1.

    On a device, small ones of a shape go through the products together; a CPU's batched product is
    slower than as many single ones.
    """
    groups: dict[Any, list[int]] = {}
    for i, m in enumerate(matrices):
        alone = i if m.is_cpu or m.numel() > BATCHED else -1
        groups.setdefault((m.shape, m.device, alone), []).append(i)
    found: list[Any] = [None] * len(matrices)
    for places in groups.values():
        low = [matrices[i] for i in places]
        made = _newton_schulz(low[0], s)[None] if len(low) == 1 else batch(low, s)
        for i, m in zip(places, made, strict=True):
            found[i] = m
    return found


def batch(matrices: list[Tensor], s: Rates) -> Tensor:
    """The same for matrices of one shape, stacked."""
    return _newton_schulz(torch.stack(matrices), s)


def _newton_schulz(x: Tensor, s: Rates) -> Tensor:
    """x [rows, cols] or a stack of it through `rounds` of a X + (b A + c A A) X with A = X X'."""
    a, b, c = s.coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=s.eps)
    add = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(s.rounds):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


Muon.__doc__ = f"""torch.optim.Muon with matrices of a shape together; arguments as torch's, and:
{EXTRAS}"""
