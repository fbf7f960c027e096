"""The optimizer's step within backward: a gradient is gone as soon as it has been used."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer


class StepInBackward:
    """What step_in_backward returns: the optimizers by parameter name, and the way to stop.

    `optimizers` are ordinary ones, for schedules and inspection.
    """

    def __init__(self, model: Module, factory: Callable[[Iterable[Tensor]], Optimizer]) -> None:
        self.optimizers: dict[str, Optimizer] = {}
        made = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        for name, param in made:
            optimizer = factory([param])
            if getattr(optimizer, "max_grad_norm", None) is not None:
                raise ValueError(
                    "optimizer_factory: max_grad_norm needs all gradients at once, which "
                    "step_in_backward never has"
                )
            self.optimizers[name] = optimizer
        self._hooks = [
            param.register_post_accumulate_grad_hook(_stepper(self.optimizers[name]))
            for name, param in made
        ]

    def remove(self) -> None:
        """Backward leaves gradients again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' state_dicts by parameter name."""
        return {name: o.state_dict() for name, o in self.optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what state_dict() returned; KeyError when a parameter is missing."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])


def _stepper(optimizer: Optimizer) -> Callable[[Parameter], None]:
    def step(param: Any) -> None:
        optimizer.step()
        param.grad = None

    return step


def step_in_backward(
    model: Module, optimizer_factory: Callable[[Iterable[Tensor]], Optimizer]
) -> StepInBackward:
    """Updates each parameter of `model` as soon as backward has its gradient, and frees that.

    `optimizer_factory([parameter])` makes an optimizer for each parameter that requires gradients.
    Not for accumulation over micro-batches, loss scaling or clipping, which need all gradients:
    ValueError for an optimizer with `max_grad_norm`.

    >>> handle = step_in_backward(model, lambda p: fastllm.optim.AdamW(p, state_dtype="int8"))
    """
    return StepInBackward(model, optimizer_factory)
