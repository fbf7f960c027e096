"""verify=: the proof of a swap on the user's own input.

The model runs before and after, in eval mode, without gradients and (if a parameter wants one) with random
upstream gradients. A float64 deep copy is the oracle: swapped may be at most twice as far from it as the
original. Every swapped norm is held against its formula on what it really receives, too, so that an error
is put down to the module that makes it. Nothing of the run stays in the model.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.proof import Proof, compare
from fastllm.swap import classes
from fastllm.swap.handle import Handle
from fastllm.swap.report import Row
from fastllm.swap.run import as_calls, preserved, run

Results = list[dict[str, Tensor]]


class Verification:
    """`before` runs the original, `after` the swapped model and puts back what fails."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        wrapper = isinstance(model, nn.parallel.DistributedDataParallel)
        self.model: nn.Module = model.module if wrapper else model
        self.calls = as_calls(inputs)
        self.gradients = any(p.requires_grad for p in self.model.parameters())
        self.notes: list[str] = []
        self.proofs: dict[nn.Module, Proof] = {}
        self.stock: Results = []
        self.exact: Results = []
        self.noise: Results = []

    def before(self, choices: dict[nn.Module, Any]) -> None:
        """Runs the original and its oracle, and every norm that is going to be swapped."""
        with preserved(self.model):
            self._each_norm(choices)
            if self.gradients:
                try:
                    self.stock = self._results(self.model)
                except RuntimeError as error:  # reentrant checkpointing refuses torch.autograd.grad
                    self.gradients = False
                    self.stock = self._results(self.model)
                    self.notes.append(f"gradients were not compared: {str(error).splitlines()[0]}")
            else:
                self.stock = self._results(self.model)
            self._oracle()

    def after(self, handle: Handle, rows: list[Row], blocks: dict[nn.Module, Row]) -> None:
        """Compares; puts back single norms, then the fused additions, then everything."""
        by_path = {row.path: row for row in rows if row.new and not row.adds}
        for path, module in list(handle.modules.items()):
            proof = self.proofs.get(module)
            if proof is None or path not in by_path:
                continue
            by_path[path].error, by_path[path].budget = proof.error, proof.budget
            if not proof.ok:
                handle.put_back(module)
                by_path[path].reason = f"verify: {proof.message}"
        worst = self._compare()
        if not worst.ok and blocks:
            self.notes.append(f"verify: {worst.message}; the fused additions were put back")
            for module, row in blocks.items():
                handle.put_back(module)
                row.reason = f"verify: {worst.message}"
            worst = self._compare()
        if not worst.ok:
            self.notes.append(f"verify: {worst.message}; everything was put back")
            for module in list(handle.modules.values()):
                handle.put_back(module)
            for row in rows:
                row.reason = row.reason or f"verify: {worst.message}"
        else:
            what = "outputs and gradients" if self.gradients else "outputs"
            count = f"{len(self.calls)} input{'' if len(self.calls) == 1 else 's'}"
            self.notes.append(f"verified {what} on {count}; nearest to its budget: {worst.message}")

    def _results(self, model: nn.Module, double: torch.dtype | None = None) -> Results:
        likes = self.stock or [None] * len(self.calls)
        return [
            run(model, call, self.gradients, double, like)
            for call, like in zip(self.calls, likes, strict=True)
        ]

    def _oracle(self) -> None:
        """Fills `exact`, and `noise`: what the original's distance from it is measured with."""
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        low = bool(dtypes) and torch.float32 not in dtypes and torch.float64 not in dtypes
        self.noise = self.stock
        for dtype in (torch.float64, *([torch.float32] if low else [])):
            try:
                self._check_memory(dtype)
                self.exact = self._results(copy.deepcopy(self.model).to(dtype), dtype)
            except (RuntimeError, TypeError, ValueError, MemoryError, AttributeError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.notes.append(f"the model cannot run in {dtype}: {reason}")
                continue
            return
        try:
            self._check_memory(None)
            twin = copy.deepcopy(self.model)
        except (RuntimeError, TypeError, MemoryError, AttributeError) as error:
            raise ValueError(
                f"verify: the model cannot be copied, so there is nothing to compare with: {error}"
            ) from error
        self.notes.append(
            "compared with the original's own result; its noise is that of parameters off by half a unit"
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in twin.parameters():
                if p.is_floating_point():
                    off = torch.randn(p.shape, generator=generator).to(p.device)
                    p.mul_(1 + off * torch.finfo(p.dtype).eps / 2)
        self.exact, self.noise = self.stock, self._results(twin)

    def _check_memory(self, dtype: torch.dtype | None) -> None:
        """MemoryError rather than the kernel's out-of-memory killer; devices raise by themselves."""
        on_cpu = [p for p in self.model.parameters() if p.device.type == "cpu"]
        need = sum(p.numel() * (dtype or p.dtype).itemsize for p in on_cpu) * 2
        free = (
            os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            if hasattr(os, "sysconf")
            else need
        )
        if need > free:
            raise MemoryError(f"a copy would take {need >> 20} MB, {free >> 20} MB are free")

    def _compare(self) -> Proof:
        """The result that is nearest to, or furthest over, its budget."""
        with preserved(self.model):
            new = self._results(self.model)
        proofs = []
        for mine, stock, exact in zip(new, self.noise, self.exact, strict=True):
            if mine.keys() != stock.keys():
                odd = sorted(mine.keys() ^ stock.keys())
                return Proof(False, float("inf"), 0.0, f"{odd[0]}: only one of the models has it")
            for name, value in mine.items():
                proofs.append(compare(name, value, stock[name], exact[name]))
        failed = [p for p in proofs if not p.ok] or proofs
        nothing = Proof(True, 0.0, 0.0, "the model returns no floating tensor")
        return max(failed, key=lambda p: p.error / (p.budget or 1.0), default=nothing)

    def _each_norm(self, choices: dict[nn.Module, Any]) -> None:
        hooks = []
        for module, choice in choices.items():
            hook = self._hook(choice.recipe)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            for call in self.calls:
                run(self.model, call, gradients=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, recipe: Any) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            plain = x is not None and type(x) is Tensor and not x.is_nested
            if not plain or any(p is not None and p.is_meta for p in module._parameters.values()):
                return
            proof = prove_norm(module, recipe, x)
            before = self.proofs.get(module)
            if before is None or not proof.ok or (before.ok and proof.error > before.error):
                self.proofs[module] = proof

        return hook


@dataclass(frozen=True)
class _Twin:
    """A module that shares the parameters' values and nothing else, as an instance of any class."""

    module: nn.Module

    def of(self, cls: type, dtype: torch.dtype | None = None) -> Any:
        twin = object.__new__(cls)
        for name, value in vars(self.module).items():
            if name not in ("forward", "_old_forward", "_hf_hook"):
                vars(twin)[name] = value.copy() if isinstance(value, dict) else value
        for name, p in self.module._parameters.items():
            if p is not None:
                leaf = p.detach().to(dtype or p.dtype)
                twin._parameters[name] = nn.Parameter(leaf, requires_grad=p.is_floating_point())
        return twin


@torch.enable_grad()
def prove_norm(module: nn.Module, recipe: Any, x: Tensor) -> Proof:
    """Ours against the original on `x`, with gradients, and the fused form against both."""
    twin = _Twin(module)
    made = classes.make(type(module), recipe)
    ours, stock, exact = twin.of(made), twin.of(type(module)), twin.of(type(module), torch.float64)
    generator = torch.Generator().manual_seed(0)
    names, mine = _with_gradients(ours, lambda x: made.forward(ours, x), x, generator)
    _, theirs = _with_gradients(stock, lambda x: type(module).forward(stock, x), x, generator)
    _, right = _with_gradients(exact, recipe.exact(exact), x.double(), generator, theirs[0].dtype)
    proofs = [compare(*four) for four in zip(names, mine, theirs, right, strict=True)]
    if hasattr(made, "add"):
        half = x.detach() * 0.5
        rest = x.detach() - half
        total = half + rest
        output, found = made.add(ours, half, rest)
        if not torch.equal(found.nan_to_num(7.0), total.nan_to_num(7.0)):
            return Proof(False, float("inf"), 0.0, "fused addition: the sum differs")
        proofs.append(
            compare(
                "fused addition",
                output.detach(),
                type(module).forward(stock, total).detach(),
                recipe.exact(exact)(total.double()).detach(),
            )
        )
    failed = [p for p in proofs if not p.ok] or proofs
    return max(failed, key=lambda p: p.error / (p.budget or 1.0))


def _with_gradients(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
) -> tuple[list[str], list[Tensor]]:
    """Output and gradients for the same random upstream gradient each time."""
    x = x.detach().requires_grad_()
    y = forward(x)
    upstream = torch.randn(y.shape, generator=generator.manual_seed(1)).to(y.device)
    upstream = upstream.to(dtype or y.dtype).to(y.dtype)
    params = {n: p for n, p in module._parameters.items() if p is not None}
    grads = torch.autograd.grad(y, [x, *params.values()], upstream)
    names = ["output", "gradient of the input", *(f"gradient of {n}" for n in params)]
    return names, [y.detach(), *grads]
