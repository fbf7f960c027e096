"""Finds out what a norm-like module computes, by running it on a throwaway copy.

Names say little: a class called LayerNorm may be an RMS norm (T5), and an RMS norm may scale by 1
+ weight (Gemma). So the copy gets random weights (all ones or zeros distinguish nothing), random
inputs of several sizes and another epsilon, and is compared with every candidate's formula in
float64, gradients included. The user's parameters, attributes and hooks are neither run nor
touched.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastllm.core.errors import UnsupportedError
from fastllm.core.proof import compare, relative_error
from fastllm.swap.bare import bare, isolated, only_argument, state
from fastllm.swap.norms import Norm, Pair, apply, formula

CANDIDATES = (("rms_norm", 0.0), ("rms_norm", 1.0), ("layer_norm", 0.0), ("layer_norm", 1.0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BIASES = ("bias", "beta")
# float32 noise stays far below, the nearest wrong formula (another place for epsilon) far above
AGREES = 2e-5
# the same in units of the dtype's epsilon: some originals round after every step
SANE = 32


@dataclass(frozen=True)
class Structure:
    """The parts of a norm: attribute names, and forward's only argument."""

    weight: str | None
    bias: str | None
    eps: tuple[str, ...]
    size: int
    argument: str


def structure(module: nn.Module) -> Structure | str:
    """The parts, or the reason why this is not a norm we could know."""
    if module._modules:
        return f"it has child modules ({', '.join(module._modules)})"
    buffers = [n for n, b in module._buffers.items() if b is not None]
    if buffers:
        return f"it keeps buffers ({', '.join(buffers)})"
    params = {n: p for n, p in module._parameters.items() if p is not None}
    if any(isinstance(p, UninitializedParameter) for p in params.values()):
        return "its parameters are not initialized yet"
    if any(p.dim() != 1 for p in params.values()):
        return "its parameters are not one-dimensional"
    bias = next((n for n in params if n in BIASES), None)
    weights = [n for n in params if n != bias]
    if len(weights) > 1 or (bias and not weights) or len({p.shape for p in params.values()}) > 1:
        return f"its parameters ({', '.join(params)}) are not a weight and a bias of one shape"
    eps = tuple(n for n, v in vars(module).items() if "eps" in n and type(v) is float)
    if not eps:
        return "it has no float epsilon attribute"
    argument = only_argument(type(module))
    if argument is None:
        return "its forward takes more than one argument"
    size = len(params[weights[0]]) if weights else _last_size(module)
    return Structure(weights[0] if weights else None, bias, eps, size, argument)


def _last_size(module: nn.Module) -> int:
    shape = getattr(module, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) and len(shape) == 1 else 48


def signature(module: nn.Module) -> Any:
    """Modules of one signature behave alike and are probed once; None: cannot tell."""
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):
        return None
    values = []
    for name, value in vars(module).items():
        if name.startswith("_") or name == "training":
            continue
        if not isinstance(value, int | float | str | bool | tuple | torch.dtype | None):
            return None
        values.append((name, value))
    params = tuple(
        (n, None if p is None else (p.dtype, tuple(p.shape), p.device))
        for n, p in module._parameters.items()
    )
    key = (type(module), tuple(values), params)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def identify(module: nn.Module, backend: str | None) -> tuple[Norm, float] | str:
    """The recipe that does what `module` does and its error, or the reason why there is none."""
    parts = structure(module)
    if isinstance(parts, str):
        return parts
    param = next((p for p in module._parameters.values() if p is not None), None)
    device = torch.device("cpu") if param is None or param.is_meta else param.device
    own = torch.float32 if param is None else param.dtype
    if own not in DTYPES:
        return f"its parameters are {str(own).removeprefix('torch.')}"
    with isolated(device):
        return _identify(_Probe(module, parts, device), own, backend)


def _identify(probe: "_Probe", own: torch.dtype, backend: str | None) -> tuple[Norm, float] | str:
    parts = probe.parts
    try:
        reason = probe.moody()
        found = [] if reason else list(probe.candidates())
    except Exception as error:  # whatever a stranger's forward raises means: not a norm we know
        return f"its forward does not run on random input: {type(error).__name__}: {error}"
    if reason:
        return reason
    if len(found) != 1:
        return "no norm we have computes what it computes" if not found else "it is ambiguous"
    kind, offset, eps = found[0]
    recipe = Norm(
        kind, parts.weight, parts.bias, eps, offset, (), (), parts.argument, backend=backend
    )
    weights: tuple = DTYPES if parts.weight else (None,)
    pairs = list(itertools.product(DTYPES, weights))
    served, reasons, errors = probe.served(recipe, pairs, autocast=False)
    mine = (own, own if parts.weight else None)
    if mine not in served:
        return f"ours differs in {str(own).removeprefix('torch.')}: {reasons.get(mine)}"
    autocast, _, _ = probe.served(recipe, pairs, autocast=True)
    chosen = Norm(
        kind, parts.weight, parts.bias, eps, offset, served, autocast, parts.argument, backend
    )
    return chosen, errors[mine]


class _Probe:
    """Runs the original class's forward on copies that share nothing with the user's module."""

    def __init__(self, module: nn.Module, parts: Structure, device: torch.device) -> None:
        self.module, self.parts, self.device = module, parts, device
        self.run = type(module).forward
        self.actual = {name: getattr(module, name) for name in parts.eps}
        self.weight = None if parts.weight is None else torch.randn(parts.size, dtype=torch.float64)
        self.bias = None if parts.bias is None else torch.randn(parts.size, dtype=torch.float64)

    def copy(self, dtype: torch.dtype | None, eps: dict[str, float], training: bool = False) -> Any:
        """The module without hooks, with random parameters of `dtype` and these epsilons."""
        twin = bare(self.module, training)
        vars(twin).update(eps)
        for own, random in ((self.parts.weight, self.weight), (self.parts.bias, self.bias)):
            if own is not None and random is not None:
                twin._parameters[own] = nn.Parameter(random.to(self.device, dtype))
        return twin

    def inputs(self, eps: dict[str, float]) -> Iterator[tuple[dict[str, float], Tensor]]:
        """Inputs of 2, 3 and 4 dimensions, small enough for epsilon to matter and large ones."""
        n = self.parts.size
        other = {name: 0.37 + 0.25 * i for i, name in enumerate(eps)}
        near = max(math.sqrt(max(*eps.values(), 0.0)), 1e-3)
        for values, shape, scale in (
            (eps, (5, n), 1.0),
            (eps, (2, 3, n), near),
            (other, (2, 2, 3, n), 1.0),
            (other, (3, n), 0.1),
            (other, (2, 4, n), 20.0),
        ):
            x = scale * (torch.randn(shape, dtype=torch.float64) + 0.3)
            yield values, x.to(self.device)

    def moody(self) -> str | None:
        """Whether two runs differ, or leave something behind in the module."""
        for training in (False, True):
            twin = self.copy(torch.float32, self.actual, training)
            x = torch.randn(3, self.parts.size, device=self.device)
            before = state(twin)
            first, second = self.run(twin, x), self.run(twin, x)
            if not isinstance(first, Tensor):
                return "its forward does not return one tensor"
            if not torch.equal(first, second):
                return "its forward is random"
            if before != state(twin):
                return "its forward changes the module"
        return None

    def candidates(self) -> Iterator[tuple[str, float, str]]:
        """(kind, offset, name of epsilon) of the formulas that agree, gradients too."""
        trials = [
            (values, x.float(), *self.stock(values, x.float()))
            for values, x in self.inputs(self.actual)
        ]
        for (kind, offset), eps in itertools.product(CANDIDATES, self.parts.eps):
            if (kind == "rms_norm" and self.parts.bias) or (offset and not self.parts.weight):
                continue
            if all(self.agrees(kind, offset, eps, *trial) for trial in trials):
                yield kind, offset, eps

    def stock(self, eps: dict[str, float], x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Output, gradients and upstream gradient of the original in float32."""
        twin = self.copy(torch.float32, eps, training=True)
        x = x.clone().requires_grad_()
        y = self.run(twin, x)
        upstream = torch.randn(y.shape, device=y.device).to(y.dtype)
        params = [p for p in twin._parameters.values() if p is not None]
        return y, list(torch.autograd.grad(y, [x, *params], upstream)), upstream

    def agrees(
        self,
        kind: str,
        offset: float,
        eps: str,
        values: dict[str, float],
        x: Tensor,
        y: Tensor,
        grads: list[Tensor],
        upstream: Tensor,
    ) -> bool:
        """Whether the formula gives the original's output and gradients, up to float32 noise."""
        if y.shape != x.shape or y.dtype != x.dtype:
            return False
        twin = self.copy(torch.float64, values)  # rounded as the float32 run had them
        for p in twin._parameters.values():
            if p is not None:
                p.data = p.data.float().double()
        x = x.double().requires_grad_()
        weight = getattr(twin, self.parts.weight) if self.parts.weight else None
        bias = getattr(twin, self.parts.bias) if self.parts.bias else None
        exact = formula(kind, offset, x, weight, bias, values[eps])
        params = [p for p in twin._parameters.values() if p is not None]
        exact_grads = torch.autograd.grad(exact, [x, *params], upstream.double())
        pairs = [(y, exact), *zip(grads, exact_grads, strict=True)]
        return all(relative_error(mine.detach(), e.detach()) < AGREES for mine, e in pairs)

    def served(
        self, recipe: Norm, pairs: list[Pair], autocast: bool
    ) -> tuple[tuple[Pair, ...], dict[Pair, str], dict[Pair, float]]:
        """The dtype pairs that ours serves within budget; reasons of the rest, errors."""
        good, reasons, errors = [], {}, {}  # type: ignore[var-annotated]
        for pair in pairs:
            try:
                worst = self.measure(recipe, pair, autocast)
            except (RuntimeError, TypeError, ValueError, UnsupportedError) as error:
                reasons[pair] = str(error)
                continue
            good.append(pair)
            errors[pair] = worst
        return tuple(good), reasons, errors

    @torch.no_grad()
    def measure(self, recipe: Norm, pair: Pair, autocast: bool) -> float:
        """The largest error of ours over all inputs; ValueError when one is over budget."""
        dtype, weight = pair
        worst = 0.0
        mode = torch.autocast(self.device.type, torch.bfloat16) if autocast else nullcontext()
        for values, x in self.inputs(self.actual):
            x = x.to(dtype)
            twin = self.copy(weight, values)
            with mode:
                stock = self.run(twin, x)
            if not stock.isfinite().all():  # overflows where ours does not
                if stock.dtype != dtype:
                    raise ValueError(f"the original returns {stock.dtype}")
                continue
            exact = recipe.exact(twin)(x.double())
            if relative_error(stock, exact) > SANE * torch.finfo(dtype).eps:
                raise ValueError("the original computes something else in this dtype")
            proof = compare("output", apply(recipe, twin, x), stock, exact)
            if not proof.ok:
                raise ValueError(proof.message)
            worst = max(worst, proof.error)
        return worst
