"""Recipes for norm modules, and the float64 formulas they are held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.swap.bare import rename_argument

Pair = tuple[torch.dtype, torch.dtype | None]  # dtype of the input, dtype of the weight


@dataclass(frozen=True)
class DropIn:
    """torch's own class, exactly -> fastllm's class of the same name."""

    replacement: type
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (self.replacement,)

    def namespace(self, base: type) -> dict[str, Any]:
        return {"backend": self.backend}

    def exact(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module as a function of one float64 tensor, differentiable in its parameters too."""
        base: Any = next(
            c for c in self.replacement.__mro__ if c.__module__.startswith("torch.nn.")
        )
        return lambda x: base.forward(module, x)


@dataclass(frozen=True)
class Norm:
    """Another class that computes rms_norm or layer_norm, as probing found out.

    weight, bias, eps  names of the attributes; weight and bias may be None
    offset             what is added to the weight (1 for Gemma)
    served             dtype pairs for which the original agrees with ours in value and dtype;
                       in every other one the original's own forward runs
    served_autocast    the same when autocast is on
    argument           the name of forward's argument
    """

    kind: str
    weight: str | None
    bias: str | None
    eps: str
    offset: float
    served: tuple[Pair, ...]
    served_autocast: tuple[Pair, ...]
    argument: str
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        forward = _forward(self, base.forward)
        return {
            "forward": rename_argument(forward, self.argument, base),
            "add": _add(self),
        }

    def exact(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        weight = getattr(module, self.weight) if self.weight else None
        bias = getattr(module, self.bias) if self.bias else None
        eps = getattr(module, self.eps)
        return lambda x: formula(self.kind, self.offset, x, weight, bias, eps)


def formula(
    kind: str, offset: float, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The definition over the last dimension, in x's dtype (Ba 2016, Zhang & Sennrich 2019)."""
    if kind == "layer_norm":
        x = x - x.mean(-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + offset)
    return y if bias is None else y + bias.to(y.dtype)


def apply(recipe: Norm, module: Any, x: Tensor) -> Tensor:
    """Ours on `x` with the module's parameters."""
    weight = getattr(module, recipe.weight) if recipe.weight else None
    shape = (x.shape[-1] if weight is None else weight.shape[0],)
    offset, backend, eps = recipe.offset, recipe.backend, getattr(module, recipe.eps)
    if recipe.kind == "rms_norm":
        return F.rms_norm(x, shape, weight, eps, weight_offset=offset, backend=backend)
    bias = getattr(module, recipe.bias) if recipe.bias else None
    return F.layer_norm(x, shape, weight, bias, eps, weight_offset=offset, backend=backend)


def _forward(recipe: Norm, stock: Callable) -> Any:
    weight, served, served_autocast = recipe.weight, recipe.served, recipe.served_autocast
    offset, backend, eps = recipe.offset, recipe.backend, recipe.eps
    rms = recipe.kind == "rms_norm" and weight is not None  # the usual case, without detours

    def forward(self: Any, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.is_nested:
            return stock(self, x)
        w = None if weight is None else getattr(self, weight)
        pair = (x.dtype, None if w is None else w.dtype)
        if torch.is_autocast_enabled(x.device.type):
            if pair not in served_autocast:
                return stock(self, x)
            with torch.autocast(x.device.type, enabled=False):
                return apply(recipe, self, x)
        if pair not in served:
            return stock(self, x)
        if rms:
            shape, e = (w.shape[0],), getattr(self, eps)  # type: ignore[union-attr]
            return F.rms_norm(x, shape, w, e, weight_offset=offset, backend=backend)
        return apply(recipe, self, x)

    return forward


def _add(recipe: Norm) -> Callable[..., tuple[Tensor, Tensor]]:
    weight, served, bias = recipe.weight, recipe.served, recipe.bias
    offset, backend, eps = recipe.offset, recipe.backend, recipe.eps
    rms = recipe.kind == "rms_norm"

    def add(self: Any, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(forward(input + residual), input + residual) in one pass; both of one shape."""
        w = None if weight is None else getattr(self, weight)
        if (input.dtype, None if w is None else w.dtype) not in served:
            total = input + residual
            return self.forward(total), total
        shape, e = (input.shape[-1] if w is None else w.shape[0],), getattr(self, eps)
        if rms:
            return F.add_rms_norm(
                input, residual, shape, w, e, weight_offset=offset, backend=backend
            )
        b = None if bias is None else getattr(self, bias)
        return F.add_layer_norm(
            input, residual, shape, w, b, e, weight_offset=offset, backend=backend
        )

    return add
