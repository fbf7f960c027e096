"""The table of what matches -> what replaces it.

A rule looks at a module and answers with a Choice: a recipe and the error it measured, or the
reason to leave the module alone. The first rule that matches decides. A new rule is a row in
RULES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastllm import nn as fast
from fastllm.core.op import OPS
from fastllm.swap import probe
from fastllm.swap.norms import DropIn, Norm


@dataclass(frozen=True)
class Choice:
    """What a rule decided: `recipe` and the op it calls, or `reason`."""

    recipe: DropIn | Norm | None = None
    op: str = ""
    error: float | None = None
    reason: str | None = None


@dataclass
class Context:
    """What rules share during one swap: the forced backend, and what was probed already."""

    backend: str | None
    probed: dict[Any, Any]


@dataclass(frozen=True)
class Rule:
    """`matches(module)` -> bool; `choose(module, context)` -> Choice."""

    name: str
    matches: Callable[[nn.Module], bool]
    choose: Callable[[nn.Module, Context], Choice]


def _exactly(stock: type, replacement: type, op: str) -> Rule:
    pristine = stock.forward  # type: ignore[attr-defined]

    def choose(module: nn.Module, context: Context) -> Choice:
        if stock.forward is not pristine or pristine.__module__ != stock.__module__:  # type: ignore[attr-defined]
            return Choice(reason=f"{stock.__name__}.forward was replaced by another library")
        return Choice(DropIn(replacement, context.backend), op)

    return Rule(f"torch.nn.{stock.__name__}", lambda m: type(m) is stock, choose)


def _looks_like_a_norm(module: nn.Module) -> bool:
    """By name or by an epsilon, with nothing inside. Probing decides what it is."""
    if isinstance(module, torch.jit.ScriptModule) or module._modules:
        return False
    named = "norm" in type(module).__name__.lower()
    return named or any("eps" in name and type(v) is float for name, v in vars(module).items())


def _by_behaviour(module: nn.Module, context: Context) -> Choice:
    key = probe.signature(module)
    found = context.probed.get(key)
    if found is None:
        found = probe.identify(module, context.backend)
        if key is not None:
            context.probed[key] = found
    if isinstance(found, str):
        return Choice(reason=found)
    recipe, error = found
    return Choice(recipe, recipe.kind, error)


RULES = (
    _exactly(nn.LayerNorm, fast.LayerNorm, "layer_norm"),
    _exactly(nn.RMSNorm, fast.RMSNorm, "rms_norm"),
    _exactly(nn.GroupNorm, fast.GroupNorm, "group_norm"),
    Rule("a norm, by what it computes", _looks_like_a_norm, _by_behaviour),
)


def choose(module: nn.Module, context: Context) -> Choice | None:
    """The first matching rule's answer; None when no rule is about this module."""
    for rule in RULES:
        if rule.matches(module):
            return rule.choose(module, context)
    return None


def backend_name(choice: Choice, module: nn.Module, x: torch.Tensor | None = None) -> str:
    """The backend that will run: for `x`, or for a small input in the module's own dtype."""
    recipe, op = choice.recipe, OPS[choice.op]
    params = [p for p in module._parameters.values() if p is not None]
    if recipe is None or any(p.is_meta for p in params):
        return "auto"
    like = params[0] if params else torch.empty(0)
    try:
        if isinstance(module, nn.GroupNorm):
            x = like.new_empty(1, module.num_channels, 4) if x is None else x
            args: tuple = (x, module.num_groups, module.weight, module.bias, module.eps)
        else:
            shape = getattr(module, "normalized_shape", None) or (
                tuple(like.shape) if params else (64,)
            )
            x = like.new_empty(8, *shape) if x is None else x
            weight = params[0] if params else None
            tail = (1e-6, 0.0)
            bias = () if choice.op == "rms_norm" else (params[1] if params[1:] else None,)
            args = (x, shape, weight, *bias, *tail)
        return op.select(args, recipe.backend).name
    except (RuntimeError, TypeError, ValueError):
        return recipe.backend or "auto"
