"""Finds out which feed-forward block a module is, by running it with small stand-ins inside.

The module's own forward runs on a copy whose children are small random projections, the formula
of its activation and marks in place of the dropouts, so that neither the user's weights nor
their hooks are touched and a block of any size costs the same. What it computes, gradients
included, has to be what exactly one arrangement of the children computes.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import nn as fast
from fastllm.core.proof import Proof, compare, relative_error
from fastllm.swap import classes
from fastllm.swap.activations import FORMULAS
from fastllm.swap.bare import bare, isolated, only_argument, state
from fastllm.swap.mlp import KINDS, MLP
from fastllm.swap.probe import DTYPES
from fastllm.swap.prove import DRAWS, worst_of

SIZE = 8  # of the stand-ins, which are all square but for a packed one
ACTS = {**FORMULAS, "relu": torch.relu}
AGREES = 1e-9


class _Mark(nn.Module):
    """In place of a dropout: not linear, so that its place can be told."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.strength * torch.tanh(x))


class _Act(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.forward = ACTS[name]


def features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a projection, whatever its class: Linear, Conv1D, quantized, with an adapter."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(type(size) is int for size in sizes):
            return sizes  # type: ignore[return-value]
    return None


def parts(module: nn.Module, names: dict[str, str]) -> tuple[list, list, str] | None:
    """Names of the projections, dropouts and the activation; None: something else is inside.

    names: the children that are activations, and what they compute.
    """
    projections, drops, acts = [], [], []
    for name, child in module._modules.items():
        if child is None:
            continue
        if name in names:
            acts.append(name)
        elif isinstance(child, nn.Dropout):
            drops.append(name)
        elif features(child) is not None:
            projections.append(name)
        else:
            return None
    if len(acts) != 1 or not 1 <= len(projections) <= 3 or module._parameters or module._buffers:
        return None
    return projections, drops, acts[0]


def identify(
    module: nn.Module, names: dict[str, str], backend: str | None
) -> tuple[MLP, float] | str | None:
    """The recipe and its error; the reason why there is none; None when it is no such block."""
    found = parts(module, names)
    if found is None:
        return None
    base: Any = classes.original(module)
    argument = only_argument(base)
    if argument is None:
        return "its forward takes more than one argument"
    if getattr(module, "chunk_size_feed_forward", 0):
        return "it works in chunks, to save memory"
    candidates = list(_candidates(module, *found, names[found[2]], argument, backend))
    with isolated(torch.device("cpu")):
        probe = _Probe(module, base, found, candidates)
        try:
            agreeing = [c for c in candidates if probe.agrees(c)]
        except Exception as error:  # whatever a stranger's forward raises on stand-ins
            return f"its forward does not run on stand-ins: {type(error).__name__}: {error}"
        if len(agreeing) != 1:
            return "no feed-forward block we have computes what it computes"
        errors = []
        for dtype in DTYPES:
            proof = probe.measure(agreeing[0], dtype)
            if not proof.ok:
                return f"ours differs in {str(dtype).removeprefix('torch.')}: {proof.message}"
            errors.append(proof.error)
    return agreeing[0], errors[0]


def _candidates(
    module: nn.Module,
    projections: list[str],
    drops: list[str],
    act: str,
    activation: str,
    argument: str,
    backend: str | None,
) -> Iterator[MLP]:
    """Every arrangement whose sizes fit."""
    sizes = {name: features(module._modules[name]) for name in projections}
    for kind, (count, ends) in KINDS.items():
        if count + ends != len(projections):
            continue
        for order in itertools.permutations(projections):
            inner, down = order[:count], order[count] if ends else None
            between = {sizes[name][1] for name in inner}  # type: ignore[index]
            wide = sizes[down][0] * (2 if kind == "packed" else 1) if down else None  # type: ignore[index]
            if len(between) != 1 or (wide is not None and between != {wide}):
                continue
            for split in itertools.product((True, False), repeat=len(drops)):
                early = tuple(d for d, s in zip(drops, split, strict=True) if s)
                late = tuple(d for d, s in zip(drops, split, strict=True) if not s)
                if down is None and early:
                    continue
                (wide,) = between
                names = (kind, inner, down, act, activation, early, late, argument)
                yield MLP(*names, wide, backend)


class _Probe:
    """Runs the module's own forward and the candidates on the same stand-ins."""

    def __init__(self, module: nn.Module, base: Any, found: tuple, candidates: list[MLP]) -> None:
        self.module, self.base = module, base
        self.projections, self.drops, self.act = found
        self.packed = {c.inner[0] for c in candidates if c.kind == "packed"}
        self.draw()

    def draw(self) -> None:
        """Other random values."""
        self.weights: dict[str, list[Tensor]] = {}
        for name in self.projections:
            rows = SIZE * (2 if name in self.packed else 1)
            self.weights[name] = [torch.randn(rows, SIZE).double() / SIZE**0.5]
            if getattr(self.module._modules[name], "bias", None) is not None:
                self.weights[name].append(torch.randn(rows).double())
        self.x = torch.randn(4, 16, SIZE).double()
        self.upstream = torch.randn(4, 16, 2 * SIZE).double()

    def children(self, kind: type, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Any]:
        """Stand-ins in `dtype`, of values that `rounded` can hold: projections and marks."""
        made: dict[str, Any] = {}
        for name, (weight, *bias) in self.weights.items():
            made[name] = kind(*weight.t().shape, bias=bool(bias), dtype=dtype)
            for p, value in zip(made[name].parameters(), (weight, *bias), strict=True):
                p.data = value.to(rounded).to(dtype)
        return made | {name: _Mark(0.3 + 0.2 * i) for i, name in enumerate(self.drops)}

    def results(
        self, forward: Any, children: dict[str, Any], dtype: torch.dtype, rounded: torch.dtype
    ) -> list[Tensor]:
        """Output, gradient of the input, gradients of all stand-ins."""
        x = self.x.to(rounded).to(dtype).requires_grad_()
        y = forward(x)
        if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1]:
            raise ValueError("it does not return one tensor of the input's rows")
        upstream = self.upstream[..., : y.shape[-1]].to(rounded).to(y.dtype)
        leaves = [p for name in self.projections for p in children[name].parameters()]
        return [y.detach(), *torch.autograd.grad(y, [x, *leaves], upstream)]

    def stock(self, activation: str, dtype: torch.dtype, training: bool = True) -> list[Tensor]:
        """What the module's own forward gives."""
        twin = bare(self.module, training, self.base)
        children = self.children(nn.Linear, dtype, dtype)
        twin._modules = {n: children.get(n) for n in self.module._modules}
        twin._modules[self.act] = _Act(activation)
        before = state(twin)
        found = self.results(lambda x: self.base.forward(twin, x), children, dtype, dtype)
        if before != state(twin):
            raise ValueError("it changes the module")
        return found

    def exact(self, recipe: MLP, rounded: torch.dtype) -> list[Tensor]:
        """What the formula gives in float64."""
        double, act = torch.float64, ACTS[recipe.activation]
        children = self.children(nn.Linear, double, rounded)
        return self.results(lambda x: recipe.formula(children, x, act), children, double, rounded)

    def agrees(self, recipe: MLP) -> bool:
        """Whether the module computes what `recipe` says, in both modes, gradients too."""
        right = self.exact(recipe, torch.float64)
        for training in (False, True):
            found = self.stock(recipe.activation, torch.float64, training)
            pairs = list(zip(found, right, strict=True))
            if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
                return False
            if any(relative_error(a, b) >= AGREES for a, b in pairs):
                return False
        return True

    def measure(self, recipe: MLP, dtype: torch.dtype) -> Proof:
        """Ours against the original in `dtype`; what is over budget in every draw is not noise."""
        for _ in range(DRAWS):
            self.draw()
            children = self.children(fast.Linear, dtype, dtype)
            children[self.act] = None
            mine = self.results(lambda x: recipe.compute(children, x), children, dtype, dtype)  # noqa: B023
            theirs, right = self.stock(recipe.activation, dtype), self.exact(recipe, dtype)
            names = ["output", *("gradient",) * (len(mine) - 1)]
            worst = worst_of(
                [compare(*each) for each in zip(names, mine, theirs, right, strict=True)]
            )
            if worst.ok:
                break
        return worst
