"""One module held against its formula, and the rounding noise that all proofs allow for."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.proof import Proof, compare
from fastllm.swap import classes
from fastllm.swap.bare import bare

DRAWS = 4


def half_a_unit_off(value: Tensor, generator: torch.Generator) -> Tensor:
    """`value` with a random relative error of half a unit in the last place; integers as is."""
    if not value.is_floating_point():
        return value
    off = torch.randn(value.shape, generator=generator) * torch.finfo(value.dtype).eps / 2
    return (value.double() * (1 + off.to(value.device))).to(value.dtype)


def second_look(
    name: str, value: Tensor, stock: Tensor, exact: Tensor, draws: Iterable[Tensor]
) -> Proof:
    """`value` within budget of `stock`, or else of one of `draws`: other roundings of the same."""
    first = compare(name, value, stock, exact)
    if first.ok:
        return first
    again = (compare(name, value, draw, exact) for draw in draws)
    return next((proof for proof in again if proof.ok), first)


def worst_of(proofs: list[Proof]) -> Proof:
    """The proof that is furthest over its budget, or nearest to it."""
    failed = [p for p in proofs if not p.ok] or proofs
    nothing = Proof(True, 0.0, 0.0, "nothing floating to compare")
    return max(failed, key=lambda p: p.error / (p.budget or 1.0), default=nothing)


@torch.enable_grad()
def prove_module(module: nn.Module, recipe: Any, x: Tensor) -> Proof:
    """Ours against the original on `x`, with gradients, and the fused form, too."""
    original: Any = type(module)
    made: Any = classes.make(original, recipe)
    x = x.detach()
    ours, exact = _twin(module, made), _twin(module, original, torch.float64)

    def stock(x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        twin = _twin(module, original, None, generator)
        return _results(twin, lambda x: original.forward(twin, x), x)

    def draws(x: Tensor, i: int) -> Iterator[Tensor]:
        for seed in range(DRAWS):
            generator = torch.Generator().manual_seed(seed)
            yield stock(half_a_unit_off(x, generator), generator)[i]

    params = [n for n, p in module._parameters.items() if p is not None]
    slope = ["gradient of the input"] if x.is_floating_point() else []
    names = ["output", *slope, *(f"gradient of {n}" for n in params)]
    theirs = stock(x)
    mine = _results(ours, lambda x: made.forward(ours, x), x)
    right = _results(exact, recipe.exact(exact), _double(x), theirs[0].dtype)
    proofs = [
        second_look(name, mine[i], theirs[i], right[i], draws(x, i)) for i, name in enumerate(names)
    ]
    if hasattr(made, "add"):
        half = x * 0.5
        rest = x - half
        total = half + rest
        output, found = made.add(ours, half, rest)
        if not torch.equal(found.nan_to_num(7.0), total.nan_to_num(7.0)):
            return Proof(False, float("inf"), 0.0, "fused addition: the sum differs")
        proofs.append(
            second_look(
                "fused addition",
                output.detach(),
                stock(total)[0],
                recipe.exact(exact)(total.double()).detach(),
                draws(total, 0),
            )
        )
    return worst_of(proofs)


def _twin(
    module: nn.Module,
    cls: type,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """An instance of `cls` with the module's values: no hooks, own leaves."""
    twin = bare(module, module.training, cls)
    for name, p in module._parameters.items():
        if p is not None:
            leaf = p.detach() if generator is None else half_a_unit_off(p.detach(), generator)
            twin._parameters[name] = nn.Parameter(leaf.to(dtype or p.dtype))
    return twin


def _results(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Output and gradients, for the same upstream gradient each time, rounded to `dtype`."""
    x = x.detach().requires_grad_(x.is_floating_point())
    y = forward(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    upstream = upstream.to(y.device, dtype or y.dtype).to(y.dtype)
    params = [p for p in module._parameters.values() if p is not None]
    leaves = [x, *params] if x.requires_grad else params
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x
