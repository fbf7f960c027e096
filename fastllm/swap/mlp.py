"""Feed-forward blocks: the activation between the projections, fused with what is around it.

The projections stay the very children they are, with their parameters, hooks and adapters: one
that is hooked, wrapped or of a foreign class is called as a module, and only what is left of the
block is fused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.nn.hooks import observed
from fastllm.nn.mlp import activated, fuses, gated, glu, weight_of
from fastllm.nn.worth import worth, worth_a_pass
from fastllm.swap.activations import activation_of
from fastllm.swap.bare import rename_argument

# kind -> how many projections before the activation, and whether one comes after it
KINDS = {
    "gated": (2, True),  # down(act(gate(x)) * up(x))
    "packed": (1, True),  # the same with gate and up in one weight, gate first
    "plain": (1, True),  # down(act(up(x)))
    "half": (1, False),  # act(up(x)): the rest is another module
}


@dataclass(frozen=True)
class MLP:
    """The recipe of a feed-forward block; all parts are named by the child's name.

    inner     the projections before the activation: (gate, up) of the gated kind, else one
    down      the projection after it
    drops     dropouts before `down`; last: after it
    argument  the name of forward's argument
    wide      columns of the first projection's result
    """

    kind: str
    inner: tuple[str, ...]
    down: str | None
    act: str
    activation: str
    drops: tuple[str, ...]
    last: tuple[str, ...]
    argument: str
    wide: int
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        original, recipe = base.forward, self
        act, activation, down = self.act, self.activation, self.down
        forced = self.backend is not None

        def forward(self: Any, x: Tensor) -> Tensor:
            children = self._modules
            function = children[act]
            if activation_of(function) != activation or observed(function):
                return original(self, x)
            if not _plain(x, children.get(down)) or not (forced or recipe.pays(children, x)):
                return original(self, x)
            return recipe.compute(children, x)

        return {"forward": rename_argument(forward, self.argument, base)}

    def pays(self, children: Mapping[str, Any], x: Tensor) -> bool:
        """Whether compute() is faster than the original with its children: a gate is a pass
        less, an activation on its own is one only inside of a product that is ours."""
        if self.kind in ("gated", "packed"):
            return worth_a_pass(x, self.wide)
        if fuses(children[self.inner[0]], x, self.activation):
            return True
        weight = weight_of(children[self.inner[0]])
        return weight is not None and worth(x, weight)

    def ops(self) -> tuple[str, ...]:
        """The ops it may call: the product with its epilogue, and what does without the product."""
        gate = "swiglu" if self.activation == "silu" else "geglu"
        return {"gated": ("gated_linear", gate), "packed": (gate,)}.get(self.kind, ("linear",))

    def describe(self) -> str:
        """For the report."""
        parts = {
            "gated": f"{self.activation}(gate) * up",
            "packed": f"{self.activation}(gate) * up of one projection",
        }
        return parts.get(self.kind, f"linear + {self.activation}")

    def compute(self, children: Mapping[str, Any], x: Tensor) -> Tensor:
        """The block with these children."""
        name, backend = self.activation, self.backend
        first = children[self.inner[0]]
        if self.kind == "gated":
            y = gated(name, first, children[self.inner[1]], x, backend)
        elif self.kind == "packed":
            gate, up = first(x).chunk(2, -1)
            y = glu(name, gate, up, backend)
        else:
            y = activated(name, first, x, backend)
        for drop in self.drops:
            y = children[drop](y)
        if self.down is not None:
            y = children[self.down](y)
        for drop in self.last:
            y = children[drop](y)
        return y

    def formula(self, children: Mapping[str, Any], x: Tensor, act: Callable) -> Tensor:
        """The definition, with every child called and `act` for the activation."""
        y = children[self.inner[0]](x)
        if self.kind == "packed":
            y, up = y.chunk(2, -1)
            y = act(y) * up
        else:
            y = act(y)
        if self.kind == "gated":
            y = y * children[self.inner[1]](x)
        for name in (*self.drops, *([self.down] if self.down else []), *self.last):
            y = children[name](y)
        return y


def _plain(x: Any, down: Any) -> bool:
    """False where the original may do more than the formula: nested tensors, mixed dtypes (T5)."""
    if not isinstance(x, Tensor) or x.is_nested:
        return False
    weight = getattr(down, "weight", None)
    if weight is None or weight.dtype == x.dtype:
        return True
    return torch.is_autocast_enabled(x.device.type)
