"""verify=: the proof of a swap on the user's own input.

The model runs before and after, in eval mode, without gradients and (if a parameter wants one)
with random upstream gradients. A float64 deep copy is the oracle: swapped may be at most twice as
far from it as the original. Every swapped module is held against its formula on what it really
receives, too, so that an error is put down to the module that makes it. Nothing of the run stays
in the model.

Through a whole model, both distances are draws of rounding noise, and a lucky draw of the
original says little. So a result over its budget gets a second look: four more draws of the
original, with parameters off by half a unit in the last place. Within twice the distance of one
of these, it is noise.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.proof import Proof
from fastllm.core.run import as_calls, preserved, run
from fastllm.swap.handle import Handle, restore
from fastllm.swap.prove import DRAWS, half_a_unit_off, prove_module, second_look, worst_of
from fastllm.swap.report import MODULES, Row

Results = list[dict[str, Tensor]]


class Verification:
    """`before` runs the original, `after` the swapped model and puts back what fails."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        wrapper = isinstance(model, nn.parallel.DistributedDataParallel)
        inner: Any = model.module if wrapper else model
        self.model: nn.Module = inner
        self.calls = as_calls(inputs)
        self.gradients = any(p.requires_grad for p in self.model.parameters())
        self.notes: list[str] = []
        self.proofs: dict[nn.Module, Proof] = {}
        self.stock: Results = []
        self.exact: Results = []
        self.noise: Results = []
        self.draws: list[Results] = []

    def before(self, choices: dict[nn.Module, Any]) -> None:
        """Runs the original and its oracle, and every module that is going to be swapped."""
        with preserved(self.model):
            self._each_module(choices)
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
        """Compares; puts back single modules, then the fused blocks, then everything."""
        by_path = {row.path: row for row in rows if row.new and row.kind in MODULES}
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
            self.notes.append(f"verify: {worst.message}; the fused blocks were put back")
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
        likes: list[Any] = self.stock or [None] * len(self.calls)
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
        self.notes.append(
            "compared with the original's own result; its noise: that of parameters half a unit off"
        )
        self.exact, self.noise = self.stock, self._draw(0)

    def _draw(self, seed: int) -> Results:
        """Results of the original with every parameter half a unit in the last place off."""
        try:
            self._check_memory(None)
            twin = copy.deepcopy(self.model)
        except (RuntimeError, TypeError, MemoryError, AttributeError) as error:
            raise ValueError(
                f"verify: the model cannot be copied, so there is nothing to compare with: {error}"
            ) from error
        restore(twin)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in twin.parameters():
                if p.is_floating_point():
                    p.copy_(half_a_unit_off(p, generator))
        return self._results(twin)

    def _check_memory(self, dtype: torch.dtype | None) -> None:
        """MemoryError before the system kills the process; devices raise by themselves."""
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
        proofs: list[Proof] = []
        for i, (mine, stock) in enumerate(zip(new, self.noise, strict=True)):
            if mine.keys() != stock.keys():
                odd = sorted(mine.keys() ^ stock.keys())
                return Proof(False, float("inf"), 0.0, f"{odd[0]}: only one of the models has it")
            proofs += [self._second_look(name, i, value) for name, value in mine.items()]
        return worst_of(proofs)

    def _second_look(self, name: str, i: int, value: Tensor) -> Proof:
        def draws() -> Iterator[Tensor]:
            for seed in range(1, DRAWS + 1):
                if len(self.draws) < seed:
                    with preserved(self.model):
                        self.draws.append(self._draw(seed))
                yield self.draws[seed - 1][i][name]

        return second_look(name, value, self.noise[i][name], self.exact[i][name], draws())

    def _each_module(self, choices: dict[nn.Module, Any]) -> None:
        hooks = [
            m.register_forward_pre_hook(self._hook(c.recipe), with_kwargs=True)
            for m, c in choices.items()
            if c.kind != "attention"  # of several inputs: what the whole model gives decides
        ]
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
            if (
                x is None
                or not plain
                or any(p is not None and p.is_meta for p in module._parameters.values())
            ):
                return
            proof = prove_module(module, recipe, x)
            before = self.proofs.get(module)
            if before is None or not proof.ok or (before.ok and proof.error > before.error):
                self.proofs[module] = proof

        return hook
