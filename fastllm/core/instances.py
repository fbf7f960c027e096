"""Another class for a module that exists: whoever holds the instance goes on holding it."""

from types import MethodType
from typing import Any

from torch import nn


def is_bound(value: Any, module: nn.Module, function: Any) -> bool:
    """Whether `value` is `function` as a method of `module`."""
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is function


def assign(module: nn.Module, cls: Any) -> None:
    """Gives `module` the class `cls`, bound forwards in its __dict__ included (accelerate's)."""
    before = type(module).forward
    object.__setattr__(module, "__class__", cls)
    for name in ("forward", "_old_forward"):
        if is_bound(vars(module).get(name), module, before):
            vars(module)[name] = MethodType(cls.forward, module)
