"""What is fused in a module's forward, together with children that were swapped.

Each finder looks at a module and answers with a recipe and the row of the report, a row with the
reason against it, or None when it is not about this module. A module gets the first one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastllm.core.op import OPS
from fastllm.swap import attention, classes, experts, mlp_probe, rewrite, rotary
from fastllm.swap.activations import activation_of
from fastllm.swap.classes import Recipe
from fastllm.swap.recompile import Unfusable
from fastllm.swap.report import Row
from fastllm.swap.rules import why_no_backend

Found = tuple[Recipe | None, Row] | None


@dataclass
class Finder:
    """Looks for blocks in one swap.

    swapped  the modules that this swap has changed already
    allowed  what it may touch at all
    """

    swapped: set[nn.Module]
    allowed: set[nn.Module]
    backend: str | None
    known: dict[Any, Any] = field(default_factory=dict)

    def find(self, path: str, module: nn.Module) -> Iterator[tuple[Recipe | None, Row]]:
        """At most one recipe, and rows with reasons."""
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            return
        kinds: tuple[Callable[[str, Any], Found], ...] = (
            self.adds,
            self.mlp,
            self.experts,
            self.attention,
            self.rotary,
        )
        for kind in kinds:
            found = kind(path, module)
            if found is None:
                continue
            recipe, row = found
            reason = row.reason or classes.unfit(module)
            if reason:
                row.reason, row.new, recipe = reason, "", None
            yield recipe, row
            if recipe is not None:
                return

    def adds(self, path: str, module: nn.Module) -> Found:
        """Residual additions followed by one of the swapped norms."""
        mine = [n for n, c in module._modules.items() if c in self.swapped and hasattr(c, "add")]
        if not mine:
            return None
        base, row = classes.original(module), Row(path, type(module).__name__)
        row.kind = "residual addition"
        flags = tuple((n, v) for n, v in vars(module).items() if type(v) is bool)
        try:
            key = (base, tuple(module._modules), flags)
            if key not in self.known:
                self.known[key] = rewrite.sites(base, module)
        except Unfusable as error:
            row.reason = f"additions not fused: {error}"
            return None, row
        names = tuple(sorted(name for name in self.known[key] if name in mine))
        if not names:
            return None
        row.new, row.adds = "addition + " + ", ".join(names), len(names)
        return rewrite.FuseAdds(names), row

    def mlp(self, path: str, module: nn.Module) -> Found:
        """A feed-forward block whose activation is swapped, or ReLU between swapped linears."""
        children = [c for c in module._modules.values() if c is not None]
        names = {
            n: name
            for n, c in module._modules.items()
            if (c in self.swapped or type(c) is nn.ReLU) and (name := activation_of(c))
        }
        if not names or not any(c in self.swapped for c in children):
            return None
        base = classes.original(module)
        simple = tuple((n, v) for n, v in vars(module).items() if type(v) in (bool, int, float))
        inside = tuple((n, _kind(c), names.get(n)) for n, c in module._modules.items())
        others = tuple((n, id(v)) for n, v in vars(module).items() if not n.startswith("_"))
        key = (base, simple, inside, others)
        if key not in self.known:
            self.known[key] = mlp_probe.identify(module, names, self.backend)
        found = self.known[key]
        if found is None:
            return None
        row = Row(path, type(module).__name__, kind="MLP")
        if isinstance(found, str):
            row.reason = f"MLP not fused: {found}"
            return None, row
        recipe, row.error = found
        row.reason = _lacking(recipe.ops(), self.backend) or ""
        row.new = f"fastllm {recipe.describe()}"
        return recipe, row

    def experts(self, path: str, module: nn.Module) -> Found:
        """The experts of a mixture in a Hugging Face model."""
        if module not in self.allowed or not experts.looks_like_experts(module):
            return None
        row = Row(path, type(module).__name__, kind="mixture of experts")
        acts = tuple(map(activation_of, module._modules.values()))
        key = ("experts", classes.original(module), acts)
        if key not in self.known:
            self.known[key] = experts.identify(module, self.backend)
        found = self.known[key]
        if isinstance(found, str):
            row.reason = f"experts not grouped: {found}"
            return None, row
        row.reason = _lacking(experts.OPS, self.backend) or ""
        row.new = f"fastllm grouped_linear, {found.activation}(gate) * up"
        return found, row

    def attention(self, path: str, module: nn.Module) -> Found:
        """The attention function that a Hugging Face module looks up, and the rotation with it."""
        base = classes.original(module)
        if module not in self.allowed or not attention.looks_up(base):
            return None
        row = Row(path, type(module).__name__, kind="attention function")
        turned = self.rotary(path, module)
        turn = turned[0] if turned is not None and not turned[1].reason else None
        assert turn is None or isinstance(turn, rotary.Rotary)
        key = attention.signature(module)
        if key not in self.known:
            try:
                self.known[key] = attention.identify(module, turn, self.backend)
            except Unfusable as error:
                self.known[key] = error
        recipe = self.known[key]
        if isinstance(recipe, Unfusable):
            row.reason = f"attention not fused: {recipe}"
            return None, row
        row.reason = _lacking(("attention",), self.backend) or ""
        row.new = "fastllm attention"
        if turned is not None and turn is not None:
            row.new, row.also = f"fastllm attention, {turned[1].new}", (turned[1].kind,)
        return recipe, row

    def rotary(self, path: str, module: nn.Module) -> Found:
        """The rotation of queries and keys in an attention module."""
        base = classes.original(module)
        if module not in self.allowed or not module._modules:
            return None
        row = Row(path, type(module).__name__, kind="rotary embedding")
        if ("rotary", base) not in self.known:
            try:
                self.known["rotary", base] = rotary.site(base)
            except Unfusable as error:
                self.known["rotary", base] = error
        found = self.known["rotary", base]
        if found is None:
            return None
        if isinstance(found, Unfusable):
            row.reason = f"rotation not fused: {found}"
            return None, row
        row.reason = _lacking(("rotary_embedding",), self.backend) or ""
        row.new = f"fastllm rotary_embedding in place of {found}"
        return rotary.Rotary(found, self.backend), row


def _kind(child: Any) -> Any:
    """What a probe sees of a child."""
    if child is None:
        return None
    biased = getattr(child, "bias", None) is not None
    return classes.original(child), mlp_probe.features(child), biased


def _lacking(ops: tuple[str, ...], backend: str | None) -> str | None:
    reasons = (why_no_backend(op, backend) for op in ops if op in OPS)
    return next((r for r in reasons if r), None)
