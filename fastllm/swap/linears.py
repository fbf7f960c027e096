"""Projections: torch's Linear, and the Conv1D of GPT-2, which keeps its weight transposed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.core.proof import relative_error
from fastllm.nn.worth import worth
from fastllm.swap.bare import bare, isolated, only_argument, rename_argument
from fastllm.swap.probe import AGREES


@dataclass(frozen=True)
class Transposed:
    """Another class that computes x @ weight + bias, with weight [in, out] and bias [out]."""

    argument: str
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        original, backend = base.forward, self.backend

        def forward(self: Any, x: Tensor) -> Tensor:
            weight = self.weight.t()
            if backend is None and not worth(x, weight, self.bias):
                return original(self, x)
            return F.linear(x, weight, self.bias, backend=backend)

        renamed = rename_argument(forward, self.argument, base)
        return {"forward": renamed, "_fastllm_transposed": True}

    def exact(self, module: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: x @ module.weight + module.bias


def why_not(module: nn.Module) -> str | None:
    """Why a torch.nn.Linear is left alone, or None."""
    weight = module.weight
    if type(module) is not nn.Linear:
        return "a subclass of Linear, with a forward of its own"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None


def looks_transposed(module: nn.Module) -> bool:
    """A weight [in, out], a bias [out] and nothing else."""
    if module._modules or module._buffers or isinstance(module, torch.jit.ScriptModule):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if len(module._parameters) != 2 or type(weight) is not type(bias) or weight is None:
        return False
    fits = weight.dim() == 2 and bias is not None and bias.shape == weight.shape[1:]
    return fits and "linear" not in type(module).__name__.lower()


def identify(module: Any, backend: str | None) -> tuple[Transposed, float] | str:
    """The recipe for a module that computes x @ weight + bias, or the reason against it."""
    argument = only_argument(type(module))
    if argument is None:
        return "its forward takes more than one argument"
    twin: Any = bare(module, True)
    with isolated(torch.device("cpu")):
        for name, p in module._parameters.items():
            twin._parameters[name] = nn.Parameter(torch.randn(p.shape))
        weight, bias = twin.weight, twin.bias
        x = torch.randn(2, 3, weight.shape[0], requires_grad=True)
        try:
            y = type(module).forward(twin, x)
            upstream = torch.randn_like(y)
            found = [y, *torch.autograd.grad(y, [x, weight, bias], upstream)]
            right = [(x @ weight + bias).double(), (upstream @ weight.t()).double()]
            flat = upstream.flatten(0, 1)
            right += [(x.flatten(0, 1).t() @ flat).double(), flat.sum(0).double()]
        except Exception as error:  # whatever a stranger's forward raises
            return f"its forward does not run on random input: {type(error).__name__}: {error}"
        errors = [
            relative_error(a.detach(), b.detach()) if a.shape == b.shape else float("inf")
            for a, b in zip(found, right, strict=True)
        ]
    if not max(errors) < AGREES:
        return "it does not compute x @ weight + bias"
    return Transposed(argument, backend), max(errors)
