"""Experts of a mixture as transformers keeps them: their products as two grouped ones.

Known by structure (one weight with gate above up and one for down, of all experts, no biases) and
proven by running the class's own forward on a small copy, values and gradients. What the router
does stays the model's.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.proof import relative_error
from fastllm.nn.hooks import observed
from fastllm.nn.moe import ACTIVATIONS, moe_experts
from fastllm.swap.activations import activation_of
from fastllm.swap.bare import bare, isolated
from fastllm.swap.lazy import plain

OPS = ("grouped_linear", "moe_permute", "moe_unpermute")
NAMES = ("gate_up_proj", "down_proj")
AGREES = 1e-10  # in float64
ROWS_EACH = 128  # of an expert, from which on grouped products win without a float32 backward pass


@dataclass(frozen=True)
class Experts:
    """The recipe; `act` is the name of the activation's child, `transposed` of [E, in, out]."""

    act: str
    activation: str
    transposed: bool
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        original, recipe = base.forward, self

        def forward(
            self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            given = (hidden_states, top_k_index, top_k_weights)
            return recipe.run(self, *given) if recipe.fits(self, *given) else original(self, *given)

        return {"forward": forward}

    def fits(self, module: Any, x: Any, index: Any, weights: Any) -> bool:
        """Whether the module and this call are still what was proven."""
        function, tensors = module._modules.get(self.act), (x, index, weights)
        if activation_of(function) != self.activation or observed(function):
            return False
        if module._is_expert_parallel or not all(isinstance(t, Tensor) for t in tensors):
            return False
        params = [module._parameters[name] for name in NAMES]
        if torch.is_autocast_enabled(x.device.type) or x.dim() != 2 or not x.numel():
            return False  # autocast: transformers' own paths differ in what they cast
        if not all(plain(p) and p.dtype == x.dtype for p in params):
            return False
        return self.backend is not None or self.pays(x, index, weights, params)

    def pays(self, x: Tensor, index: Tensor, weights: Tensor, params: list[Any]) -> bool:
        """Whether it is faster than transformers' grouped products, as measured on a CPU."""
        if not x.is_cpu:
            return False
        trained = any(t.requires_grad for t in (x, weights, *params)) and torch.is_grad_enabled()
        if trained and x.dtype == torch.float32:
            return True
        return index.numel() >= ROWS_EACH * params[0].shape[0]

    def run(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The sum over each token's experts."""
        gate_up, down = (module._parameters[name] for name in NAMES)
        if self.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return moe_experts(
            x, index, weights, gate_up, down, activation=self.activation, backend=self.backend
        )


def looks_like_experts(module: nn.Module) -> bool:
    """By the marks that transformers' decorator leaves, and the two weights."""
    marks = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel")
    return all(m in vars(module) for m in marks) and set(NAMES) <= set(module._parameters)


def identify(module: Any, backend: str | None) -> Experts | str:
    """The recipe, or why there is none."""
    acts = [n for n, c in module._modules.items() if activation_of(c) in ACTIVATIONS]
    others = [n for n, p in module._parameters.items() if p is not None and n not in NAMES]
    if len(acts) != 1 or len(module._modules) != 1:
        return "its children are not one activation that was swapped"
    if others or not module.has_gate or module.has_bias or not module.is_concatenated:
        return "its weights are not gate_up_proj and down_proj alone, gate above up"
    if module.has_post_expert_norm or module._is_expert_parallel:
        return "it norms after the experts, or its experts are spread over processes"
    name = activation_of(module._modules[acts[0]])
    assert name is not None
    recipe = Experts(acts[0], name, bool(module.is_transposed), backend)
    with isolated(torch.device("cpu")):
        try:
            error = _error(module, recipe)
        except Exception as why:  # whatever a stranger's forward raises
            return f"its forward does not run on random input: {type(why).__name__}: {why}"
    return recipe if error < AGREES else "grouped products give another result"


def _error(module: Any, recipe: Experts) -> float:
    """The largest distance from the class's own loop over experts, in float64."""
    count, hidden, inner = module.num_experts, 8, 6
    sizes = ((count, 2 * inner, hidden), (count, hidden, inner))
    twin, oracle = bare(module, False), replace(recipe, backend="reference")
    for name, size in zip(NAMES, sizes, strict=True):
        weight = torch.randn(size, dtype=torch.float64)
        weight = weight.transpose(1, 2).contiguous() if recipe.transposed else weight
        twin._parameters[name] = nn.Parameter(weight)
    x = torch.randn(11, hidden, dtype=torch.float64, requires_grad=True)
    index = torch.randint(count, (11, 2))
    weights = torch.rand(11, 2, dtype=torch.float64, requires_grad=True)
    leaves = [x, weights, *twin._parameters.values()]
    upstream = torch.randn(11, hidden, dtype=torch.float64)
    own = type(module).forward.__wrapped__  # the class's loop, whatever the config prefers
    results = []
    for y in (own(twin, x, index, weights), oracle.run(twin, x, index, weights)):
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    return max(relative_error(b.detach(), a.detach()) for a, b in zip(*results, strict=True))
