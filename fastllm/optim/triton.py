"""The multi-tensor step in Triton (fastllm.kernels.optim): on the device, without a sync."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.ops.norm.triton import _interpreted, available
from fastllm.optim import states
from fastllm.optim.settings import ADAM, SGD
from fastllm.optim.work import Work

_KEPT = 64  # tables at most
_tables: dict[Any, Any] = {}


def refuses(kind: int, works: list[Work], found_inf: Any) -> str | None:
    """Why these tensors cannot be updated here, or None."""
    reason = available()
    if reason is not None:
        return reason
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    for work in works:
        s = work.settings
        if s.stochastic:
            return "rounds stochastically"
        if found_inf is not None and kind == SGD and work.states and s.two:
            return "dampening under a loss scale"
        for row in _rows(work):
            reason = _odd(row, allowed, works[0].params[0].device)
            if reason is not None:
                return reason
    return None


def _odd(row: list[Any], allowed: tuple[str, ...], device: torch.device) -> str | None:
    param, grad, master, *rest = row
    if param.device.type not in allowed or param.device != device:
        return f"a parameter is on {param.device}"
    for t in (param, grad):
        if t.is_sparse or t.dtype not in states.KERNEL_DTYPES or t.is_neg():
            return f"a {t.dtype} {t.layout} tensor"
    for t in (master, *rest):
        if t is not None and t.dtype != torch.float32:
            return f"states are {t.dtype}"
    for t in (grad, master, *rest):
        if t is not None and (t.device != param.device or t.stride() != param.stride()):
            return "tensors of a parameter lie differently"
    return None if param.is_contiguous() or _dense(param) else "a parameter with gaps"


def _dense(t: Tensor) -> bool:
    """Whether the elements fill one run of memory, in whatever order."""
    next_stride = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size != 1 and stride != next_stride:
            return False
        next_stride *= size
    return True


def _rows(work: Work) -> list[list[Any]]:
    masters = work.masters or [None] * len(work.params)
    return [list(row) for row in zip(work.params, work.grads, masters, *work.states, strict=True)]


def _batches(kernels: Any, work: Work) -> list[tuple[list[int], Any]]:
    """(places in the work, their table) for each set of dtypes; tables are kept by address."""
    groups: dict[Any, list[int]] = {}
    rows = _rows(work)
    for i, row in enumerate(rows):
        key = row[0].dtype, row[1].dtype, row[2] is not None
        groups.setdefault(key, []).append(i)
    found = []
    for key, places in groups.items():
        mine = [rows[i] for i in places]
        addresses = kernels.addresses_of(mine)
        sizes = tuple(row[0].numel() for row in mine)
        name = (key, mine[0][0].device, sizes, tuple(map(tuple, addresses)))
        batch = _tables.get(name)
        if batch is None:
            if len(_tables) >= _KEPT:
                _tables.clear()
            batch = _tables[name] = kernels.Batch(mine, addresses)
        found.append((places, batch))
    return found


def run(
    kind: int, works: list[Work], scale: Any, found_inf: Any, max_norm: float | None
) -> Tensor | None:
    """Updates everything; returns the norm of the gradients where there is one to clip to.

    The works' `factor` is 1, or -1 to maximize: loss scale and clipping are worked out here, on
    the device.
    """
    kernels = importlib.import_module("fastllm.kernels.optim")
    device = works[0].params[0].device
    batches = [(work, places, b) for work in works for places, b in _batches(kernels, work)]
    factor = torch.ones((), device=device)
    if scale is not None:
        factor = factor / scale.to(device)
    norm = None
    if max_norm is not None:
        total = torch.stack([kernels.squares(b) for _, _, b in batches]).sum()
        norm = total.sqrt() * factor
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if found_inf is not None:
        found_inf = found_inf.to(device, torch.float32)
    for work in works:
        if work.steps:
            torch._foreach_add_(work.steps, 1.0 if found_inf is None else 1.0 - found_inf)
    for work, places, batch in batches:
        s = work.settings
        kernels.multi_step(
            batch, kind, _corrections(kind, work, places, device), factor * s.factor, found_inf,
            s.lr, s.one, s.two, s.eps, 1.0 - s.lr * s.weight_decay if s.decoupled else 1.0,
            0.0 if s.decoupled else s.weight_decay, s.nesterov,
        )  # fmt: skip
        torch.autograd.graph.increment_version([work.params[i] for i in places])
    return norm


def _corrections(kind: int, work: Work, places: list[int], device: torch.device) -> Tensor:
    """What depends on a tensor's step, [tensors, 2] in float32, worked out in float64."""
    s = work.settings
    if kind == ADAM:
        assert work.steps is not None
        time = torch.stack([work.steps[i] for i in places]).double()
        # a first step that is skipped is step 0, and not used
        time = time.clamp(min=1.0)
        pair = (1 / (1 - s.one**time), (1 - s.two**time).rsqrt())
        return torch.stack(pair, 1).float().contiguous()
    if kind == SGD:
        fresh = work.fresh or [False] * len(work.params)
        damp = [[1.0 if fresh[i] else 1.0 - s.two, 0.0] for i in places]
        return torch.tensor(damp).to(device, non_blocking=True)
    return torch.ones(len(places), 2, device=device)
