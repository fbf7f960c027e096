"""The updates in plain torch, one tensor at a time: the oracle in float64, and what runs where no
kernel does. Formulas as torch's single-tensor optimizers have them."""

import torch
from torch import Tensor

from fastllm.optim.settings import ADAM, LION, SGD, Settings


def update(
    kind: int, s: Settings, time: float, fresh: bool, param: Tensor, grad: Tensor, states: list
) -> None:
    """Updates `param` and its states in place; all of one floating dtype."""
    grad = grad * s.factor
    if s.decoupled:
        decayed = param * (1 - s.lr * s.weight_decay)
    else:
        decayed = param
        if s.weight_decay:
            grad = grad + s.weight_decay * param
    RULES[kind](s, time, fresh, param, decayed, grad, states)


def _adam(s, time, fresh, param, decayed, grad, states) -> None:  # type: ignore[no-untyped-def]
    first, second, *most = states
    first.lerp_(grad, 1 - s.one)
    second.mul_(s.two).addcmul_(grad, grad, value=1 - s.two)
    if most:
        second = torch.maximum(most[0], second, out=most[0])
    size = second.sqrt() / (1 - s.two**time) ** 0.5 + s.eps
    param.copy_(decayed).addcdiv_(first, size, value=-s.lr / (1 - s.one**time))


def _sgd(s, time, fresh, param, decayed, grad, states) -> None:  # type: ignore[no-untyped-def]
    if states:
        (buffer,) = states
        buffer.mul_(s.one).add_(grad, alpha=1.0 if fresh else 1 - s.two)
        grad = grad + s.one * buffer if s.nesterov else buffer
    param.copy_(decayed).add_(grad, alpha=-s.lr)


def _lion(s, time, fresh, param, decayed, grad, states) -> None:  # type: ignore[no-untyped-def]
    (first,) = states
    along = first.lerp(grad, 1 - s.one)
    # torch's sign() of NaN is 0, which would hide it
    sign = torch.where(along.isnan(), along, along.sign())
    first.lerp_(grad, 1 - s.two)
    param.copy_(decayed).add_(sign, alpha=-s.lr)


RULES = {ADAM: _adam, SGD: _sgd, LION: _lion}
