"""The error budget, and the proof that a backend keeps it: for tests, `fastllm check` and swap.

A result may be at most twice as far from float64 as stock PyTorch in the same dtype, plus that
dtype's epsilon (stock may be lucky). Two distances have to hold: the worst element, and the root
mean square with half the epsilon, behind which a few lucky elements cannot hide. A result of one
element (a reduced loss) has the first only: the second would be the same distance, held tighter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Case
from fastllm.core.op import Op


@dataclass(frozen=True)
class Proof:
    """Outcome of a comparison; error and budget are relative to the largest exact magnitude."""

    ok: bool
    error: float
    budget: float
    message: str


def relative_error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact| / max |exact| over finite elements; inf where the others differ."""
    return _distances(value, exact)[0]


def compare(name: str, value: Tensor, stock: Tensor, exact: Tensor) -> Proof:
    """Holds `value` against the budget that `stock` and the float64 `exact` set."""
    if value.shape != exact.shape or value.dtype != stock.dtype:
        found = f"{value.dtype} {tuple(value.shape)}"
        message = f"{name}: expected {stock.dtype} {tuple(exact.shape)}, found {found}"
        return Proof(False, math.inf, 0.0, message)
    worst, mean = _distances(value, exact)
    budget, mean_budget = _budgets(stock, exact, value.dtype)
    # half the epsilon is for a mean over many roundings: one element has one, which may be a whole
    # epsilon (a sum in another order) where stock's was lucky
    single = exact.numel() == 1
    ok = worst <= budget and (single or mean <= mean_budget)
    message = f"{name}: error {worst:.2e} of {budget:.2e}, rms {mean:.2e} of {mean_budget:.2e}"
    return Proof(ok, worst, budget, message)


@dataclass(frozen=True)
class Standard:
    """What the results of one case are held against: stock PyTorch's, and float64's.

    One standard serves every backend and instruction set level.
    """

    op: Op
    name: str
    args: tuple
    seed: int
    backward: bool
    stock: "Run"
    exact: "Run"

    def prove(self, backend: str | None = None) -> Proof:
        """Runs the case on `backend`, compares outputs and gradients, returns the worst of them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            value = run(self.op, self.args, backend, self.backward, self.stock.upstream)
        triples = zip(
            value.names, value.tensors, self.stock.tensors, self.exact.tensors, strict=True
        )
        proofs = [compare(name, *triple) for name, *triple in triples]
        failed = [p for p in proofs if not p.ok]
        worst = max(failed or proofs, key=lambda p: p.error / p.budget if p.budget else p.error)
        note = "; ".join(p.message for p in failed) or worst.message
        return Proof(not failed, worst.error, worst.budget, f"{self.op.name} {self.name}: {note}")


def standard(
    op: Op,
    case: Case,
    device: str | torch.device = "cpu",
    backward: bool = True,
    seed: int = 0,
) -> Standard:
    """The results of stock PyTorch and of the reference in float64 for `case`."""
    args = case.args(device, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        stock = run(op, args, "torch", backward)
        exact = run(op, _double(args), "reference", backward, _double(stock.upstream))
    return Standard(op, case.name, args, seed, backward, stock, exact)


def prove(
    op: Op,
    case: Case,
    backend: str | None = None,
    device: str | torch.device = "cpu",
    backward: bool = True,
    seed: int = 0,
) -> Proof:
    """Runs `case` on `backend` and compares it with its standard."""
    return standard(op, case, device, backward, seed).prove(backend)


@dataclass(frozen=True)
class Run:
    """Outputs, then gradients of one call, with the upstream gradients that were used."""

    names: list[str]
    tensors: list[Tensor]
    upstream: tuple[Tensor, ...]


def run(
    op: Op, args: tuple, backend: str | None, backward: bool, upstream: tuple[Tensor, ...] = ()
) -> Run:
    """One call forward and, if asked, backward, with random upstream gradients unless given."""
    backward = backward and bool(op.gradients)
    leaves = [
        a.detach().requires_grad_(backward and wants_grad(op, i, a)) if isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    ]
    out = op(*leaves, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    if op.values is not None:
        outputs = op.values(args, outputs)
    names = [f"output {i}" for i in range(len(outputs))]
    tensors = [o.detach() for o in outputs]
    if backward:
        upstream = upstream or tuple(torch.randn_like(o) for o in outputs)
        wanted = {i: leaves[i] for i in sorted(op.gradients) if wants_grad(op, i, leaves[i])}
        grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
        names += [f"gradient of argument {i}" for i in wanted]
        tensors += grads
    return Run(names, tensors, upstream)


def wants_grad(op: Op, position: int, value: Any) -> bool:
    """Whether an argument can have a gradient: an attention mask may be boolean."""
    return position in op.gradients and isinstance(value, Tensor) and value.is_floating_point()


def _double(values: Iterable[Any]) -> tuple:
    return tuple(
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values
    )


def _distances(value: Tensor, exact: Tensor) -> tuple[float, float]:
    if exact.numel() == 0:
        return 0.0, 0.0
    value, exact = value.double(), exact.double()
    finite = exact.isfinite()
    odd = ~finite
    if odd.any() and not torch.equal(value[odd].nan_to_num(7.0), exact[odd].nan_to_num(7.0)):
        return math.inf, math.inf
    if not finite.any():
        return 0.0, 0.0
    off, exact = (value - exact)[finite], exact[finite]
    if not off.isfinite().all():
        return math.inf, math.inf
    worst, mean = off.abs().max().item(), off.pow(2).mean().sqrt().item()
    return worst / _scale(exact.abs().max()), mean / _scale(exact.pow(2).mean().sqrt())


def _scale(value: Tensor) -> float:
    return value.item() or 1.0


def _budgets(stock: Tensor, exact: Tensor, dtype: torch.dtype | None) -> tuple[float, float]:
    worst, mean = _distances(stock, exact)
    eps = torch.finfo(dtype or stock.dtype).eps
    return 2 * worst + eps, 2 * mean + eps / 2
