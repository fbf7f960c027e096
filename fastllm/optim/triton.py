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
# how a state is kept, by dtype and place: codes of csrc/cpu/kernels/optim.h
STORES = {
    (torch.float32, 0): 0, (torch.float32, 1): 0, (torch.bfloat16, 0): 1, (torch.bfloat16, 1): 1,
    (torch.uint8, 0): 3, (torch.int8, 1): 4,
    (torch.float8_e4m3fn, 0): 5, (torch.float8_e4m3fn, 1): 6,
}  # fmt: skip
_tables: dict[Any, Any] = {}


def refuses(works: list[Work]) -> str | None:
    """Why these tensors cannot be updated here, or None."""
    reason = available()
    if reason is not None:
        return reason
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    for work in works:
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
    if master is not None and master.dtype != torch.float32:
        return f"a master copy is {master.dtype}"
    for place, t in enumerate(rest):
        if (t.dtype, min(place, 1)) not in STORES:
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
        stores = tuple(STORES[t.dtype, min(k, 1)] for k, t in enumerate(row[3:]))
        key = row[0].dtype, row[1].dtype, row[2] is not None, stores
        groups.setdefault(key, []).append(i)
    found = []
    for key, places in groups.items():
        mine = [rows[i] for i in places]
        addresses = kernels.addresses_of(mine, [[s[i] for s in work.scales] for i in places])
        sizes = tuple(row[0].numel() for row in mine)
        name = (key, mine[0][0].device, sizes, tuple(map(tuple, addresses)))
        batch = _tables.get(name)
        if batch is None:
            if len(_tables) >= _KEPT:
                _tables.clear()
            batch = _tables[name] = kernels.Batch(mine, addresses, key[3])
        found.append((places, batch))
    return found


def run_works(
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
        corrections = _corrections(kind, work, places, device)
        _launch(kernels, batch, kind, work, places, corrections, factor, found_inf)
    return norm


def run_along(works: list[Work], sizes: list[Tensor], found_inf: Any) -> None:
    """p <- p - lr size grad: the second update of a step, with sizes of each work's tensors."""
    kernels = importlib.import_module("fastllm.kernels.optim")
    device = works[0].params[0].device
    one = torch.ones((), device=device)
    if found_inf is not None:
        found_inf = found_inf.to(device, torch.float32)
    for work, size in zip(works, sizes, strict=True):
        for places, batch in _batches(kernels, work):
            own = size if len(places) == len(size) else size[torch.tensor(places).to(device)]
            pair = torch.stack([own, torch.zeros_like(own)], 1).contiguous()
            _launch(kernels, batch, SGD, work, places, pair, one, found_inf, True)


def _launch(
    kernels: Any, batch: Any, kind: int, work: Work, places: list[int], corrections: Tensor,
    factor: Tensor, found_inf: Any, again: bool = False,
) -> None:  # fmt: skip
    s, device = work.settings, factor.device
    kernels.multi_step(
        batch, kind, corrections, _keys(work, places, device, again), factor * s.factor, found_inf,
        s.lr, s.one, s.two, s.eps, 1.0 - s.lr * s.weight_decay if s.decoupled else 1.0,
        0.0 if s.decoupled else s.weight_decay, s.nesterov, s.stochastic,
    )  # fmt: skip
    torch.autograd.graph.increment_version([work.params[i] for i in places])


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
        plain = not work.states
        damp = [[1.0 if fresh[i] or plain else 1.0 - s.two, 0.0] for i in places]
        return torch.tensor(damp).to(device, non_blocking=True)
    return torch.ones(len(places), 2, device=device)


def _keys(work: Work, places: list[int], device: torch.device, again: bool) -> Tensor:
    """The keys of the tensors' random numbers in this step, [tensors] in int32.

    again   those of a second update in the step: its seed is the first one's key
    """
    s = work.settings
    coded = s.stochastic or any(t.dtype != torch.float32 for each in work.states for t in each)
    if not (coded and work.steps):
        return torch.zeros(len(places), dtype=torch.int32, device=device)
    own = torch.tensor([states.mixed_key(s.seed, work.numbers[i]) for i in places])
    time = torch.stack([work.steps[i] for i in places]).long()
    key = states.mixed_all(own.to(device, non_blocking=True) + time)
    if again:
        numbers = torch.tensor([work.numbers[i] for i in places]).to(device, non_blocking=True)
        key = states.mixed_all(states.mixed_all(key + numbers * states.GOLDEN))
    return torch.where(key >= 1 << 31, key - (1 << 32), key).int()
