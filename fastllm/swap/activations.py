"""Activation modules: known by what they compute, on random input, gradients included."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as stock

from fastllm import nn as fast
from fastllm.core.errors import UnsupportedError
from fastllm.core.proof import compare, relative_error
from fastllm.nn.activation import apply
from fastllm.swap import classes
from fastllm.swap.bare import bare, isolated, only_argument, rename_argument, state
from fastllm.swap.probe import DTYPES, SANE

FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": stock.gelu,
    "gelu_tanh": lambda x: stock.gelu(x, approximate="tanh"),
    "silu": stock.silu,
    "relu2": lambda x: torch.relu(x).square(),
}
OP_OF: dict[str, str] = {"gelu": "gelu", "gelu_tanh": "gelu", "silu": "silu", "relu2": "relu2"}
# in float64, exact and tanh GELU are 1e-4 apart, constants typed in by hand 1e-11
AGREES = 1e-8


@dataclass(frozen=True)
class Activation:
    """Another class that computes the function called `activation`.

    served    dtypes for which the original agrees with ours in value and dtype; in every other
              one the original's own forward runs. served_autocast: the same under autocast
    argument  the name of forward's argument
    """

    activation: str
    served: tuple[torch.dtype, ...]
    served_autocast: tuple[torch.dtype, ...]
    argument: str
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        original, name, backend = base.forward, self.activation, self.backend
        served, served_autocast = self.served, self.served_autocast

        def forward(self: Any, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor) or x.is_nested:
                return original(self, x)
            autocast = torch.is_autocast_enabled(x.device.type)
            if x.dtype not in (served_autocast if autocast else served):
                return original(self, x)
            return apply(name, x, backend)

        return {"forward": rename_argument(forward, self.argument, base)}

    def exact(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return FORMULAS[self.activation]


def activation_of(module: Any) -> str | None:
    """The name of the function that a module runs by fastllm (ReLU: by torch); else None."""
    cls = type(module)
    if cls is nn.ReLU:
        return "relu"
    recipe = getattr(cls, "_fastllm_recipe", None)
    if isinstance(recipe, Activation):
        return recipe.activation
    return module.activation if issubclass(cls, fast.GELU | fast.SiLU) else None


def looks_like_one(module: nn.Module) -> bool:
    """By its name, with nothing inside. Probing decides what it is."""
    if isinstance(module, torch.jit.ScriptModule) or module._modules:
        return False
    if classes.original(module).__module__.startswith(("torch.nn.", "fastllm.")):
        return False
    name = type(module).__name__.lower()
    return any(word in name for word in ("gelu", "silu", "swish", "relu", "activation"))


def identify(module: nn.Module, backend: str | None) -> tuple[Activation, float] | str:
    """The recipe that does what `module` does and its error, or the reason why there is none."""
    if any(p is not None for p in (*module._parameters.values(), *module._buffers.values())):
        return "it has parameters or buffers"
    argument = only_argument(type(module))
    if argument is None:
        return "its forward takes more than one argument"
    with isolated(torch.device("cpu")):
        try:
            reason = _moody(module)
            name = None if reason else _named(module)
        except Exception as error:  # whatever a stranger's forward raises
            return f"its forward does not run on random input: {type(error).__name__}: {error}"
        if name is None:
            return reason or "no activation we have computes what it computes"
        served = _served(module, name, backend, autocast=False)
        if torch.float32 not in served:
            return f"{name} differs from it in float32"
        autocast = _served(module, name, backend, autocast=True)
    recipe = Activation(name, tuple(served), tuple(autocast), argument, backend)
    return recipe, served[torch.float32]


def _inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Where activations differ most, and far out."""
    return torch.cat([2 * torch.randn(3 * 64), 30 * torch.randn(64), torch.zeros(2)]).to(dtype)


def _moody(module: nn.Module) -> str | None:
    """Whether two runs differ, or leave something behind."""
    run: Any = type(module).forward
    for training in (False, True):
        twin, x = bare(module, training), _inputs(torch.float32)
        before, kept = state(twin), x.clone()
        first, second = run(twin, x), run(twin, x)
        if not isinstance(first, Tensor):
            return "its forward does not return one tensor"
        if not torch.equal(x, kept):
            return "it writes into its input"
        if not torch.equal(first, second):
            return "its forward is random"
        if before != state(twin):
            return "its forward changes the module"
    return None


def _named(module: nn.Module) -> str | None:
    """The only formula that gives the module's outputs and gradients in float64."""
    x = _inputs().requires_grad_()
    upstream = torch.randn_like(x)
    y = type(module).forward(bare(module, True), x)
    dx = torch.autograd.grad(y, x, upstream)[0]
    found = []
    for name, formula in FORMULAS.items():
        exact = formula(x)
        slope = torch.autograd.grad(exact, x, upstream)[0]
        pairs = [(y, exact), (dx, slope)]
        if y.dtype == exact.dtype and all(relative_error(a, b) < AGREES for a, b in pairs):
            found.append(name)
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def _served(
    module: nn.Module, name: str, backend: str | None, autocast: bool
) -> dict[torch.dtype, float]:
    """Dtypes in which the original computes the formula and ours is within its budget: errors."""
    errors = {}
    for dtype in DTYPES:
        x = _inputs(dtype)
        exact = FORMULAS[name](x.double())
        try:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                theirs, ours = type(module).forward(bare(module, True), x), apply(name, x, backend)
        except (RuntimeError, TypeError, ValueError, UnsupportedError):
            continue
        proof = compare("output", ours, theirs, exact)
        if proof.ok and relative_error(theirs, exact) <= SANE * torch.finfo(dtype).eps:
            errors[dtype] = proof.error
    return errors
