"""What a language model's head computes: the product of a Linear, plain or wrapped by PEFT.

A Linear of PEFT with LoRA is its base layer and one adapter; ModulesToSaveWrapper is the copy that
is trained. Anything else (several adapters at once, DoRA, hooks inside) is left to its own forward.
"""

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastllm.nn.linear import Linear

_FORWARDS = (nn.Linear.forward, Linear.forward)


@dataclass(eq=False)  # torch.compile hands no frozen one back
class Head:
    """logits = linear(x) + scale * up(low(dropout(x))); without the last term where low is None."""

    linear: Any
    low: Any = None
    up: Any = None
    dropout: Any = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The parameters."""
        layers = [m for m in (self.linear, self.low, self.up) if m is not None]
        return tuple(p for m in layers for p in (m.weight, m.bias) if p is not None)

    def dropped(self, hidden: Tensor) -> Tensor | None:
        """What the adapter reads, where that is not `hidden`: drawn once, for loss and logits."""
        if self.low is None or not (self.dropout.training and getattr(self.dropout, "p", 0.0)):
            return None
        dropped: Tensor = self.dropout(hidden.to(self.low.weight.dtype))
        return dropped

    def logits(self, hidden: Tensor, dropped: Tensor) -> Tensor:
        """As PEFT computes them, with what dropout left over of the hidden states."""
        base = self.linear(hidden)
        return (base + self.up(self.low(dropped)) * self.scale).to(base.dtype)

    def loss_arguments(self, dropped: Tensor | None) -> dict[str, Any]:
        """The arguments of linear_cross_entropy that the adapter needs."""
        if self.low is None:
            return {}
        names = ("lora_a", "lora_b", "lora_scale", "lora_input")
        values = (self.low.weight, self.up.weight, float(self.scale), dropped)
        return dict(zip(names, values, strict=True))


def find(head: Any) -> Head | str:
    """What `head` is made of now, or why it has to run its own forward."""
    if "forward" in vars(head):
        return "its head's forward was overridden on the instance"
    if isinstance(head, nn.Linear) and type(head).forward in _FORWARDS:
        return Head(head)
    if _is(head, "peft.utils.other", "ModulesToSaveWrapper"):
        return _inside(_saved(head))
    if _is(head, "peft.tuners.lora.layer", "Linear"):
        return _lora(head)
    return f"its head is a {type(head).__name__}, not a plain Linear"


def _is(head: Any, module: str, name: str) -> bool:
    """Whether head is exactly of this class, without importing PEFT."""
    return type(head) is getattr(sys.modules.get(module), name, ())


def _saved(wrapper: Any) -> Any:
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(a not in wrapper._adapters for a in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def _lora(head: Any) -> Head | str:
    names = [name for name in head.active_adapters if name in head.lora_A]
    if head.disable_adapters and head.merged:
        return "its head's adapter is merged and disabled: its own forward unmerges it"
    if head.disable_adapters or head.merged or not names:
        return _inside(head.base_layer)
    if len(names) > 1 or names[0] in head.lora_variant or not head.cast_input_dtype_enabled:
        return "its head has several adapters, or one that is more than LoRA"
    name = names[0]
    low, up, dropout = head.lora_A[name], head.lora_B[name], head.lora_dropout[name]
    base, parts = _inside(head.base_layer), [_inside(low), _inside(up)]
    if isinstance(base, str) or any(isinstance(p, str) for p in parts) or _hooked(dropout):
        return "its head's adapter has hooks or layers of its own"
    if low.bias is not None or up.bias is not None:
        return "its head's adapter has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"its head's adapter has a {type(dropout).__name__}"
    return Head(base.linear, low, up, dropout, head.scaling[name])


def _inside(module: Any) -> Head | str:
    """As find, for a module that its wrapper would call."""
    return "its head has hooks inside" if _hooked(module) else find(module)


def _hooked(module: Any) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)
