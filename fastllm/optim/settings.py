"""What a parameter group tells a kernel."""

from typing import NamedTuple

ADAM, SGD, LION = 0, 1, 2  # as in csrc/cpu/kernels/optim.h


class Settings(NamedTuple):
    """A group's settings in the order that the kernels read them.

    `one` and `two` are beta1 and beta2, or momentum and dampening; `factor` multiplies every
    gradient: 1 / loss scale, clipping, and -1 to maximize.
    """

    lr: float
    one: float = 0.0
    two: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    decoupled: bool = False
    nesterov: bool = False
    factor: float = 1.0
    stochastic: bool = False
    seed: int = 0
