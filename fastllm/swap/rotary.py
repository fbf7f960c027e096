"""The rotation of queries and keys in one attention module's forward, by fastllm.

    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    ->  q, k = self._fastllm_rotary(apply_rotary_pos_emb, q, k, cos, sin)

The function is looked up where it always was: one that somebody replaced later is called as it
is. Only the very function that was proven, on random input and with gradients, is ours to
replace; no module's globals are touched.
"""

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastllm import functional as F
from fastllm.core.proof import relative_error
from fastllm.swap.bare import isolated
from fastllm.swap.probe import AGREES
from fastllm.swap.recompile import Unfusable, definition, plain_forward, rewritten

WIDTH = 8
METHOD = "_fastllm_rotary"


@dataclass(frozen=True)
class Layout:
    """What a rotary function does: pairs side by side or half a head apart; whether the head may
    be wider than cos, its rest passing as it is."""

    interleaved: bool
    partial: bool


@dataclass(frozen=True)
class Rotary:
    """The recipe of an attention module: `function` is the global name that its forward calls."""

    function: str
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: type) -> dict[str, Any]:
        try:
            forward = plain_forward(base)
            known = forward.__globals__[self.function]
            found = layout(known)
            if found is None:
                return {}
            change = rewritten(forward, lambda node: _redirect(node, self.function))
        except (Unfusable, KeyError):  # a pickle loaded where the source is another one
            return {}
        return {"forward": change, METHOD: staticmethod(_rotate(known, found, self.backend))}


def site(base: Any) -> str | None:
    """The name of the proven rotary function that forward calls; None: there is none.

    Raises Unfusable where there is one that is not known, or the forward cannot be rewritten.
    """
    forward = inspect.unwrap(base.forward)
    if not isinstance(forward, FunctionType):
        return None
    for name in forward.__code__.co_names:
        function = forward.__globals__.get(name)
        if ("rotary" in name or "rope" in name) and isinstance(function, FunctionType):
            if not _calls(definition(forward), name):
                continue
            if layout(function) is None:
                raise Unfusable(f"{name} computes no rotation we have")
            rewritten(plain_forward(base), lambda node: _redirect(node, name))  # noqa: B023
            return name
    return None


@functools.lru_cache(maxsize=64)
def layout(function: Any) -> Layout | None:
    """What function(q, k, cos, sin) does, found out on random input; None: no rotation we know."""
    with isolated(torch.device("cpu")):
        found = [i for i in (False, True) if _agrees(function, i, WIDTH)]
        if len(found) != 1:
            return None
        return Layout(found[0], _agrees(function, found[0], WIDTH // 2))


def _agrees(function: Any, interleaved: bool, width: int) -> bool:
    """Whether outputs and gradients are those of the rotation of the first `width` elements."""
    q, k = (torch.randn(2, heads, 5, WIDTH, requires_grad=True) for heads in (3, 1))
    angles = torch.randn(2, 5, width // 2)
    angles = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    upstream = [torch.randn_like(x) for x in (q, k)]
    double = [x.detach().double().requires_grad_() for x in (q, k)]
    right = [_formula(x, cos.double(), sin.double(), interleaved) for x in double]
    try:
        found = function(q, k, cos, sin)
        if not (isinstance(found, tuple) and len(found) == 2):
            return False
        pairs = [*zip(found, right, strict=True)]
        right_slopes = torch.autograd.grad(right, double, [u.double() for u in upstream])
        pairs += zip(torch.autograd.grad(found, [q, k], upstream), right_slopes, strict=True)
        return all(a.shape == b.shape and relative_error(a, b) < AGREES for a, b in pairs)
    except Exception:  # whatever a stranger's function raises
        return False


def _formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoFormer's rotation (Su 2021) of x [B, H, T, D] by angles [B, T, R], R <= D."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return torch.cat((x * cos + turned * sin, rest), -1)


def _rotate(known: Any, found: Layout, backend: str | None) -> Callable[..., Any]:
    interleaved, partial = found.interleaved, found.partial

    def rotate(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is known and len(args) == 4 and not kwargs and _fits(args, partial):
            return F.rotary_embedding(*args, interleaved=interleaved, backend=backend)
        return function(*args, **kwargs)

    return rotate


def _fits(args: tuple, partial: bool) -> bool:
    """Whether the call is the one that was proven: plain tensors of one dtype, with heads."""
    q, k, cos, sin = args
    if not all(type(x) is Tensor for x in args):
        return False
    same = q.dtype == k.dtype == cos.dtype == sin.dtype and q.device == cos.device
    heads = q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
    if not (same and heads) or cos.requires_grad or sin.requires_grad:
        return False
    return cos.shape[-1] == q.shape[-1] or (partial and cos.shape[-1] < q.shape[-1])


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    """The calls of a global function by its name, outside of what runs at another time."""
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
    return [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == name]


def _redirect(node: ast.FunctionDef, name: str) -> ast.FunctionDef:
    """Sends the calls of `name` through self."""
    first = [*node.args.posonlyargs, *node.args.args][:1]
    stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    bound = {first[0].arg, name} if first else {name}
    if not first or any(n.id in bound and not isinstance(n.ctx, ast.Load) for n in stored):
        raise Unfusable(f"its forward assigns to {' or '.join(sorted(bound))}")
    for call in _calls(node, name):
        method = ast.Attribute(ast.Name(first[0].arg, ast.Load()), METHOD, ast.Load())
        call.args.insert(0, call.func)
        call.func = ast.copy_location(method, call)
    return node
