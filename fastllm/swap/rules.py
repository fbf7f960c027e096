"""The table of what matches -> what replaces it.

A rule looks at a module and answers with a Choice: a recipe and the error it measured, or the
reason to leave the module alone. The first rule that matches decides. A new rule is a row in
RULES. What concerns a module together with its children is in blocks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastllm import nn as fast
from fastllm.core.op import OPS
from fastllm.swap import activations, linears, probe
from fastllm.swap.classes import Recipe
from fastllm.swap.norms import DropIn


@dataclass(frozen=True)
class Choice:
    """What a rule decided: `recipe` and the op it calls, or `reason`. `kind` is the report's."""

    recipe: Recipe | None = None
    op: str = ""
    error: float | None = None
    reason: str | None = None
    kind: str = ""


@dataclass
class Context:
    """What rules share during one swap: the forced backend, what was probed already, and the
    modules inside of adapters."""

    backend: str | None
    probed: dict[Any, Any] = field(default_factory=dict)
    adapted: set[nn.Module] = field(default_factory=set)


@dataclass(frozen=True)
class Rule:
    """`matches(module)` -> bool; `choose(module, context)` -> Choice."""

    name: str
    kind: str
    matches: Callable[[nn.Module], bool]
    choose: Callable[[Any, Context], Choice]


Why = Callable[[Any], str | None]


def _exactly(
    stock: type, replacement: type, op: str, kind: str = "norm", why: Why | None = None
) -> Rule:
    """torch's class -> ours of the same name. `why` gives reasons against single instances."""
    pristine = stock.forward  # type: ignore[attr-defined]

    def choose(module: nn.Module, context: Context) -> Choice:
        if stock.forward is not pristine or pristine.__module__ != stock.__module__:  # type: ignore[attr-defined]
            return Choice(reason=f"{stock.__name__}.forward was replaced by another library")
        reason = None if why is None else why(module)
        if reason is not None:
            return Choice(reason=reason)
        return Choice(DropIn(replacement, context.backend), op)

    return Rule(f"torch.nn.{stock.__name__}", kind, lambda m: type(m) is stock, choose)


def _looks_like_a_norm(module: nn.Module) -> bool:
    """By name or by an epsilon, with nothing inside. Probing decides what it is."""
    if isinstance(module, torch.jit.ScriptModule) or module._modules:
        return False
    named = "norm" in type(module).__name__.lower()
    return named or any("eps" in name and type(v) is float for name, v in vars(module).items())


def _probed(
    identify: Callable[[Any, str | None], Any], op: Callable[[Any], str]
) -> Callable[[nn.Module, Context], Choice]:
    """A rule's choose() out of identify(module, backend) -> (recipe, error) or a reason."""

    def choose(module: nn.Module, context: Context) -> Choice:
        key = probe.signature(module)
        found = context.probed.get(key)
        if found is None:
            found = identify(module, context.backend)
            if key is not None:
                context.probed[key] = found
        if isinstance(found, str):
            return Choice(reason=found)
        recipe, error = found
        return Choice(recipe, op(recipe), error)

    return choose


def _foreign_linear(module: nn.Module) -> bool:
    """A subclass of Linear: quantized, with an adapter, parametrized. Not the one whose weight
    torch's MultiheadAttention takes: it is never called."""
    ours = fast.Linear | NonDynamicallyQuantizableLinear
    return isinstance(module, nn.Linear) and not isinstance(module, ours)


def _never(reason: str) -> Callable[[nn.Module, Context], Choice]:
    return lambda module, context: Choice(reason=reason)


def _why_not_embedding(module: nn.Embedding) -> str | None:
    if module.max_norm is not None:
        return "it renormalizes its weight (max_norm)"
    return "its gradient is sparse" if module.sparse else None


def _why_not_in_place(module: nn.SiLU) -> str | None:
    return "it writes into its input" if module.inplace else None


def _why_not_attention(module: nn.MultiheadAttention) -> str | None:
    extra = module.bias_k is not None or module.add_zero_attn
    return "it adds keys of its own (add_bias_kv, add_zero_attn)" if extra else None


SUBCLASS = "a subclass with a forward of its own"
RULES = (
    _exactly(nn.LayerNorm, fast.LayerNorm, "layer_norm"),
    _exactly(nn.RMSNorm, fast.RMSNorm, "rms_norm"),
    _exactly(nn.GroupNorm, fast.GroupNorm, "group_norm"),
    _exactly(nn.Linear, fast.Linear, "linear", "linear", linears.why_not),
    _exactly(nn.Embedding, fast.Embedding, "embedding", "embedding", _why_not_embedding),
    _exactly(
        nn.MultiheadAttention,
        fast.MultiheadAttention,
        "attention",
        "attention",
        _why_not_attention,
    ),
    _exactly(nn.GELU, fast.GELU, "gelu", "activation"),
    _exactly(nn.SiLU, fast.SiLU, "silu", "activation", _why_not_in_place),
    Rule("another linear", "linear", _foreign_linear, _never(SUBCLASS)),
    Rule(
        "another embedding",
        "embedding",
        lambda m: isinstance(m, nn.Embedding) and not isinstance(m, fast.Embedding),
        _never(SUBCLASS),
    ),
    Rule(
        "an activation, by what it computes",
        "activation",
        activations.looks_like_one,
        _probed(activations.identify, lambda recipe: activations.OP_OF[recipe.activation]),
    ),
    Rule(
        "a linear with a transposed weight, by what it computes",
        "linear",
        linears.looks_transposed,
        _probed(linears.identify, lambda recipe: "linear"),
    ),
    Rule(
        "a norm, by what it computes",
        "norm",
        _looks_like_a_norm,
        _probed(lambda m, b: probe.identify(m, b), lambda recipe: recipe.kind),
    ),
)


def choose(module: nn.Module, context: Context) -> Choice | None:
    """The first matching rule's answer; None when no rule is about this module."""
    for rule in RULES:
        if rule.matches(module):
            if module in context.adapted:
                return Choice(reason="an adapter wraps it", kind=rule.kind)
            choice = rule.choose(module, context)
            lacking = None if choice.reason else why_no_backend(choice.op, context.backend)
            reason = choice.reason or lacking
            return Choice(choice.recipe, choice.op, choice.error, reason, rule.kind)
    return None


def why_no_backend(op: str, backend: str | None) -> str | None:
    """Why `op` cannot run on the forced backend at all; None: it can, or none is forced."""
    if backend is None:
        return None
    found = OPS[op].backends.get(backend)
    if found is None:
        return f"{op} has no backend {backend!r}"
    return found.missing


def backend_name(choice: Choice, module: Any) -> str:
    """The backend that will run, for an input of some rows in the module's own dtype."""
    backend = getattr(choice.recipe, "backend", None)
    params = [p for p in module._parameters.values() if p is not None]
    if any(p.is_meta for p in params):
        return "auto"
    try:
        arguments = _ARGUMENTS[choice.kind](choice.op, module, params)
        return OPS[choice.op].select(arguments, backend).name
    except (RuntimeError, TypeError, ValueError):
        return backend or "auto"


def _norm_arguments(op: str, module: Any, params: list) -> tuple:
    like = params[0] if params else torch.empty(0)
    if isinstance(module, nn.GroupNorm):
        x = like.new_empty(1, module.num_channels, 4)
        return (x, module.num_groups, module.weight, module.bias, module.eps)
    shape = getattr(module, "normalized_shape", None) or (tuple(like.shape) if params else (64,))
    weight = params[0] if params else None
    bias = () if op == "rms_norm" else (params[1] if params[1:] else None,)
    return (like.new_empty(8, *shape), shape, weight, *bias, 1e-6, 0.0)


def _linear_arguments(op: str, module: Any, params: list) -> tuple:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    return (weight.new_empty(256, weight.shape[1]), weight, module.bias, None, None)


def _embedding_arguments(op: str, module: Any, params: list) -> tuple:
    ids = torch.zeros(256, dtype=torch.long, device=module.weight.device)
    return (module.weight, ids, module.padding_idx, module.scale_grad_by_freq)


def _activation_arguments(op: str, module: Any, params: list) -> tuple:
    return (torch.empty(256, 64), *(("none",) if op == "gelu" else ()))


def _attention_arguments(op: str, module: Any, params: list) -> tuple:
    x = params[0].new_empty(1, module.num_heads, 128, module.head_dim) if params else None
    return (x, x, x, None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0)


_ARGUMENTS: dict[str, Callable[[str, Any, list], tuple]] = {
    "norm": _norm_arguments,
    "linear": _linear_arguments,
    "embedding": _embedding_arguments,
    "activation": _activation_arguments,
    "attention": _attention_arguments,
}
