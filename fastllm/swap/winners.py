"""tune=True: each replaced module is timed where it stands, and only what wins is kept."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.measure import Call, Ratio, interleave
from fastllm.core.run import flatten, preserved
from fastllm.swap import classes
from fastllm.swap.handle import Handle
from fastllm.swap.report import Row
from fastllm.swap.rewrite import FuseAdds

SECONDS = 0.3  # for one module; modules that are alike are timed once
SLOWER = "slower here"
_OURS, _STOCK = "swapped", "original"

Inputs = tuple[tuple, dict[str, Any]]


def keep_winners(handle: Handle, rows: list[Row], calls: list[Inputs]) -> tuple[Ratio, list[str]]:
    """Puts back what is not faster on these inputs; the whole model's ratio, and what to say.

    A module with fused additions is timed together with its norms: they win or lose as one. What
    is timed is the forward pass and, where a parameter wants one, the backward pass with it.
    """
    model = handle.model
    by_path = {row.path: row for row in rows}
    known: dict[Any, Ratio] = {}
    with preserved(model):
        units = list(_units(handle))
        inputs = _inputs(model, [head for head, _ in units], calls)
        for head, members in units:
            if head not in inputs:
                continue
            key = _alike(head, members, inputs[head])
            if key not in known:
                known[key] = _ratio(head, members, inputs[head])
            for path, module in list(handle.modules.items()):
                if module not in members:
                    continue
                row = by_path[path]
                row.ratio = known[key].value
                if row.ratio < 1:
                    row.reason = SLOWER
                    handle.put_back(module)
        changed = list(handle.modules.values())
        if not changed:
            return Ratio(1.0, 1.0, 1.0), ["tune: nothing was faster than the original"]
        whole = _ratio(model, changed, calls[0], 2.0)
        return whole, [f"tune: the whole model is {whole} as fast as the original"]


def _units(handle: Handle) -> Iterator[tuple[nn.Module, set[nn.Module]]]:
    """(the module to call, all that is swapped in it): blocks with their norms, then the rest."""
    rest = set(handle.modules.values())
    for block in handle.modules.values():
        recipe = classes.recipe_of(block)
        if isinstance(recipe, FuseAdds):
            norms = {m for name in recipe.norms if (m := block._modules[name]) is not None}
            members = {block, *(n for n in norms if n in rest)}
            rest -= members
            yield block, members
    for module in handle.modules.values():
        if module in rest:
            yield module, {module}


def _inputs(
    model: nn.Module, heads: list[nn.Module], calls: list[Inputs]
) -> dict[nn.Module, Inputs]:
    """What each module receives first when the model runs."""
    found: dict[nn.Module, Inputs] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(module, (_detached(args), _detached(kwargs)))

    hooks = [head.register_forward_pre_hook(hook, with_kwargs=True) for head in heads]
    try:
        with torch.no_grad():
            for args, kwargs in calls:
                model(*_detached(args), **_detached(kwargs))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def _detached(value: Any) -> Any:
    """A copy of a nest of arguments whose tensors are leaves."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {k: _detached(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_detached(v) for v in value)
    return value


def _alike(head: nn.Module, members: set[nn.Module], given: Inputs) -> Any:
    """Modules with an equal key take equally long."""

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return tuple(value.shape), value.dtype, value.stride()
        if isinstance(value, dict):
            return tuple((k, shape(v)) for k, v in value.items())
        if type(value) in (list, tuple):
            return tuple(map(shape, value))
        return str(type(value))

    params = tuple((n, tuple(p.shape), p.dtype) for n, p in head.named_parameters())
    kinds = frozenset(map(type, members))
    return type(head), kinds, params, shape(list(given)), head.training


def _ratio(head: nn.Module, members: Any, given: Inputs, budget: float = SECONDS) -> Ratio:
    """How many times faster `head` is with its members swapped."""
    ours = {module: type(module) for module in members}
    stock = {module: classes.original(module) for module in members}
    args, kwargs = _wanting(given, any(p.requires_grad for p in head.parameters()))
    leaves = [p for p in head.parameters() if p.requires_grad]

    def once() -> None:
        outputs: dict[str, Tensor] = {}
        flatten(head.forward(*args, **kwargs), "", outputs)
        ends = [o for o in outputs.values() if o.requires_grad]
        if ends and leaves:
            torch.autograd.grad(ends, leaves, [torch.ones_like(o) for o in ends], allow_unused=True)

    def factory(kinds: dict[nn.Module, type]) -> Callable[[], Call]:
        def call(i: int) -> None:
            with _classes(kinds, ours):
                once()

        return lambda: call

    found = interleave({_OURS: factory(ours), _STOCK: factory(stock)}, budget=budget)
    if found.failed:
        raise RuntimeError(f"tune: {type(head).__name__} cannot be timed: {found.failed}")
    return found.speedup(_OURS, over=_STOCK)


def _wanting(given: Inputs, gradients: bool) -> Inputs:
    """Arguments whose floating tensors want gradients, as they do inside a model that trains."""
    args, kwargs = _detached(given[0]), _detached(given[1])
    if gradients:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    return args, kwargs


@contextlib.contextmanager
def _classes(kinds: dict[nn.Module, type], after: dict[nn.Module, type]) -> Iterator[None]:
    for module, kind in kinds.items():
        classes.assign(module, kind)
    try:
        yield
    finally:
        for module, kind in after.items():
            classes.assign(module, kind)
