"""Optimizers that look at a whole tensor before they step: a direction first, then how far."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm import _C
from fastllm.optim import states
from fastllm.optim.base import Fused
from fastllm.optim.local import is_dtensor
from fastllm.optim.settings import SGD, Settings
from fastllm.optim.work import Work, run

EXTRAS = """
    master_weights, stochastic_rounding, max_grad_norm, seed: as in fastllm.optim.AdamW. States of
    bfloat16 and float16 parameters are float32 here where torch's are not. Raises RuntimeError for
    sparse or complex gradients and for DTensors, whose norms a shard does not know.
"""


class Way(NamedTuple):
    """One tensor's way: p <- keep p - size direction."""

    direction: Tensor
    size: float
    keep: float = 1.0


class Directed(Fused):
    """Mixed into an optimizer that says for a group's tensors which way they go.

    The step along it is SGD's kernel: low precision, master copies and stochastic rounding are its
    business. A tensor's norm has to be known, so shards of a tensor are refused.
    """

    direct = False

    def ways(self, work: Work, backend: str | None) -> list[Way]:
        """Updates the states, counts the step and returns where each tensor goes."""
        raise TypeError(f"{type(self).__name__} does not say where to go")

    def apply(self, works: list[Work], backend: str | None) -> str | None:
        steps = []
        for work in works:
            for i, way in enumerate(self.ways(work, backend)):
                steps.append(_along(work, i, way))
        return run(SGD, steps, backend) if steps else None

    def collect(self, group: dict[str, Any], first: int, factor: float) -> Work:
        for p in group["params"]:
            if p.grad is None:
                continue
            if is_dtensor(p):
                raise RuntimeError(f"{type(self).__name__} needs whole tensors, found a DTensor")
            if p.is_complex():
                raise RuntimeError(f"{type(self).__name__} does not support complex parameters")
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        return super().collect(group, first, factor)


def _along(work: Work, i: int, way: Way) -> Work:
    """SGD's work of one tensor along its way."""
    s = work.settings
    time = int(work.steps[i].item()) if work.steps else 0
    # SGD's factor of the parameter is 1 - lr * weight_decay
    decay = (1.0 - way.keep) / way.size if way.size else 0.0
    settings = Settings(
        way.size, weight_decay=decay, decoupled=True, stochastic=s.stochastic,
        seed=states.key_of(s.seed, work.numbers[i], time),
    )  # fmt: skip
    # without a size to divide by, decay is left to the direction, which is not used
    if not way.size and way.keep != 1.0:
        settings = settings._replace(lr=1.0 - way.keep)
        way = Way(wide(work)[i].clone(), settings.lr)
    return work.only([i])._replace(
        settings=settings, grads=[way.direction], states=[], scales=[], steps=None, fresh=None,
        names=(),
    )  # fmt: skip


def along(work: Work, directions: list[Tensor], decay: float) -> Work:
    """The work of run_along: p <- (1 - decay) p - size direction, with each tensor's own size."""
    s = work.settings
    laid = [
        u if u.stride() == p.stride() else torch.empty_like(p, dtype=u.dtype).copy_(u)
        for u, p in zip(directions, work.params, strict=True)
    ]
    settings = Settings(
        1.0, weight_decay=decay, decoupled=True, stochastic=s.stochastic, seed=s.seed
    )
    return work._replace(settings=settings, grads=laid, states=[], scales=[])


def wide(work: Work) -> list[Tensor]:
    """The parameters as they are updated: the master copies where there are any."""
    masters = work.masters or [None] * len(work.params)
    return [p if m is None else m for p, m in zip(work.params, masters, strict=True)]


def norms(tensors: list[Tensor]) -> list[float]:
    """Each tensor's 2-norm."""
    found = _C.optim_squares(tensors, torch.get_num_threads())
    if found is None:
        return [t.double().norm().item() for t in tensors]
    return [square**0.5 for square in found]


def computed(tensor: Tensor) -> torch.dtype:
    """What is computed in for a tensor: float32, or its own wider dtype."""
    return torch.float32 if tensor.dtype in states.LOW else tensor.dtype
