"""Logits that are computed when somebody looks at them.

A training step that only wants its loss never does, and the fused loss needs no logits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.swap.heads import Head

_PLAIN = (torch.Tensor, torch.nn.Parameter)
# what is known without computing: answered from the wrapper's own metadata
_KNOWN = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
    torch.is_floating_point,
}


class Source(NamedTuple):
    """Where logits come from: the head as a module, its parts, what its adapter reads (None:
    hidden), and the autocast they were asked for under."""

    module: Any
    head: Head
    dropped: Tensor | None
    autocast: tuple[bool, torch.dtype]

    def versions(self) -> list[int]:
        """Of the parameters: what a write in place changes."""
        return [p._version for p in self.head.tensors]

    def compute(self, hidden: Tensor) -> Tensor:
        """The head's product."""
        enabled, dtype = self.autocast
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=enabled):
            if self.dropped is None:
                made: Tensor = type(self.module).forward(self.module, hidden)
                return made
            return self.head.logits(hidden, self.dropped)


class LazyLogits(Tensor):
    """head(hidden), then some steps, as a tensor that computes itself at its first real use.

    Division, multiplication by a number, tanh and float() only add a step, since that is what
    models do to their logits before the loss; anything else computes. Changing the head's weight
    first (an optimizer's step) makes the use an error, not another result.
    """

    hidden: Tensor
    source: Source
    steps: tuple[tuple[str, Any], ...]
    grad_mode: bool
    value: Tensor | None
    versions: list[int]

    @staticmethod
    def __new__(cls, hidden: Tensor, source: Source, steps: tuple, dtype: Any) -> "LazyLogits":
        shape = (*hidden.shape[:-1], source.head.linear.weight.shape[0])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        made.hidden, made.source, made.steps = hidden, source, steps
        made.grad_mode, made.value = torch.is_grad_enabled(), None
        made.versions = source.versions()
        return made

    def then(self, name: str, value: Any, dtype: torch.dtype) -> "LazyLogits":
        """The same with one more step."""
        steps = (*self.steps, (name, value))
        made = LazyLogits(self.hidden, self.source, steps, dtype)
        made.grad_mode, made.versions = self.grad_mode, self.versions
        return made

    def computed(self) -> Tensor:
        """The logits themselves."""
        if self.value is None:
            if self.source.versions() != self.versions:
                raise RuntimeError(
                    "logits: the head's weight was changed since they were asked for; with "
                    "fused_loss, look at them before the optimizer's step"
                )
            with torch._C.DisableTorchFunctionSubclass(), torch.set_grad_enabled(self.grad_mode):
                value = self.source.compute(self.hidden)
                for name, argument in self.steps:
                    value = STEPS[name](value, argument)
            self.value = value
        return self.value

    @property
    def pending(self) -> bool:
        """Whether nobody looked yet."""
        return self.value is None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], LazyLogits) else None
        if own is not None and func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if own is not None and func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            wanted = any(t.requires_grad for t in (own.hidden, *own.source.head.tensors))
            return own.grad_mode and wanted
        if own is not None and own.pending:
            step = _step(func, own, args[1:], kwargs)
            if step is not None:
                return own.then(*step)
        return func(*_computed(args), **_computed(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # what went past __torch_function__, from C++
        return func(*_computed(args), **_computed(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.computed().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.computed().__deepcopy__(memo)


STEPS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "div": lambda x, c: x / c,
    "mul": lambda x, c: x * c,
    "tanh": lambda x, _: torch.tanh(x),
    "float": lambda x, _: x.float(),
}
_NUMBERS = {
    Tensor.__truediv__: "div",
    Tensor.div: "div",
    torch.div: "div",
    Tensor.__mul__: "mul",
    Tensor.__rmul__: "mul",
    Tensor.mul: "mul",
    torch.mul: "mul",
}


def _step(func: Any, own: LazyLogits, rest: tuple, kwargs: dict) -> tuple | None:
    if kwargs:
        return None
    dtype = own.dtype
    if func in _NUMBERS and len(rest) == 1 and type(rest[0]) in (int, float) and rest[0] > 0:
        return _NUMBERS[func], rest[0], dtype
    if func in (torch.tanh, Tensor.tanh) and not rest:
        return "tanh", None, dtype
    if func is Tensor.float and not rest and dtype != torch.float64:
        return "float", None, torch.float32
    return None


def _computed(value: Any) -> Any:
    if isinstance(value, LazyLogits):
        return value.computed()
    if type(value) in (tuple, list):
        return type(value)(_computed(v) for v in value)
    if type(value) is dict:
        return {k: _computed(v) for k, v in value.items()}
    return value


def scale_and_cap(steps: tuple[tuple[str, Any], ...]) -> tuple[float, float] | None:
    """(logit_scale, softcap) of cross_entropy for these steps; None: they are something else."""
    scale, cap, tanh = 1.0, 1.0, False
    for name, value in steps:
        if name == "tanh":
            if tanh:
                return None
            tanh = True
        elif name != "float":
            factor = 1.0 / value if name == "div" else float(value)
            scale, cap = (scale, cap * factor) if tanh else (scale * factor, cap)
    # cap * tanh(scale x) is softcap * tanh(logit_scale x / softcap)
    return (scale * cap, cap) if tanh else (scale, 0.0)


def plain(tensor: Any) -> bool:
    """Neither a subclass (DTensor, a fake tensor) nor without memory of its own."""
    return type(tensor) in _PLAIN and not tensor.is_meta
