"""LazyLogits as a compiled step gives them.

A compiled graph can return plain objects and tensors, but no tensor that is yet to be computed.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.swap.lazy import STEPS, LazyLogits, Source


class Deferred:
    """head(hidden), then some steps: no Tensor, but it has a tensor's methods and operators, and
    torch's functions take it as one. It computes itself at its first real use, once."""

    def __init__(self, hidden: Tensor, source: Source, dtype: torch.dtype) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.source = source
        self.steps: tuple[tuple[str, Any], ...] = ()
        self.grad_mode, self.versions = torch.is_grad_enabled(), source.versions()
        self.made: LazyLogits | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        classes = self.source.head.linear.weight.shape[0]
        return torch.Size((*self.hidden.shape[:-1], classes))

    def tensor(self) -> Tensor:
        """The logits: lazy outside of a graph, computed inside."""
        if torch.compiler.is_compiling():
            value = self.source.compute(self.hidden)
            for name, argument in self.steps:
                value = STEPS[name](value, argument)
            return value
        if self.made is None:
            self.made = LazyLogits(self.hidden, self.source, self.steps, self.dtype)
            self.made.grad_mode, self.made.versions = self.grad_mode, self.versions
        return self.made

    def then(self, name: str, value: Any, dtype: torch.dtype) -> "Deferred":
        """The same with one more step."""
        made = Deferred(self.hidden, self.source, dtype)
        made.grad_mode, made.versions = self.grad_mode, self.versions
        made.steps = (*self.steps, (name, value))
        return made

    def _by(self, name: str, factor: Any) -> Any:
        if type(factor) in (int, float) and factor > 0:
            return self.then(name, factor, self.dtype)
        return STEPS[name](self.tensor(), factor)

    def __truediv__(self, factor: Any) -> Any:
        return self._by("div", factor)

    def __mul__(self, factor: Any) -> Any:
        return self._by("mul", factor)

    __rmul__ = __mul__

    def tanh(self) -> "Deferred":
        """Tensor.tanh."""
        return self.then("tanh", None, self.dtype)

    def float(self) -> "Deferred":
        """Tensor.float."""
        return self.then("float", None, torch.float32)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tanh and len(args) == 1 and not kwargs:
            return args[0].tanh()
        return func(*_tensors(args), **_tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.tensor().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.tensor().__deepcopy__(memo)

    def __repr__(self) -> str:
        return repr(self.tensor())


def _tensors(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.tensor()
    if type(value) in (tuple, list):
        return type(value)(_tensors(v) for v in value)
    if type(value) is dict:
        return {k: _tensors(v) for k, v in value.items()}
    return value


def _operator(name: str) -> Any:
    def apply(self: Deferred, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*_tensors(args))

    return apply


_OPERATORS = """add radd sub rsub rtruediv pow rpow neg abs matmul rmatmul eq ne lt le gt ge
getitem setitem len iter bool array and or xor invert mod floordiv hash"""
for _name in _OPERATORS.split():
    setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))
