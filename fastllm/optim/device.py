"""The step on a device, which waits for nothing: in CUDA C++ or in Triton."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastllm.core.backend import choice
from fastllm.core.errors import UnsupportedError
from fastllm.optim import cpu, cuda, triton
from fastllm.optim.local import is_dtensor
from fastllm.optim.settings import SGD, Settings
from fastllm.optim.work import Work

if TYPE_CHECKING:
    from fastllm.optim.base import Fused

BACKENDS = ("cuda", "triton")


def step(optimizer: "Fused") -> bool:
    """Updates everything there; False where it is not for these backends to do.

    By itself one is taken where torch's own step cannot do the work: no GPU was here to time it.
    """
    name = choice.name
    first = next((p for g in optimizer.param_groups for p in g["params"]), None)
    here = first is None or first.is_cpu
    if name not in BACKENDS and (name is not None or here or optimizer.not_torch() is None):
        return False
    works, rates = _collected(optimizer)
    reasons = []
    for backend in BACKENDS if name is None else (name,):
        reason = _run(backend, optimizer, works, rates) if works else None
        if reason is None:
            optimizer.measured_norm = None
            optimizer.backend_used = backend
            return True
        reasons.append(reason)
    for work in works:
        for own, fresh in zip(work.own, work.fresh or (), strict=False):
            own.update({"fresh": True} if fresh else {})  # as it was
    if name is not None:
        raise UnsupportedError(f"{type(optimizer).__name__}: backend {name!r}: {reasons[0]}")
    return False


def _collected(optimizer: "Fused") -> tuple[list[Work], list[Tensor | None]]:
    """What there is to do, and for each group its learning rate where that is on a device."""
    works, rates = [], []
    for index, group in optimizer.numbered():
        lr = group["lr"]
        rate = lr if isinstance(lr, Tensor) and not lr.is_cpu else None
        # to read it would be to wait for it
        plain = group if rate is None else {**group, "lr": 0.0}
        work = cpu.resolved(optimizer.collect(plain, index, 1.0))
        if work.params:
            works.append(work)
            rates.append(rate)
    return works, rates


def _run(
    backend: str, optimizer: "Fused", works: list[Work], rates: list[Tensor | None]
) -> str | None:
    """Updates everything, or changes nothing and returns why."""
    indirect = None if optimizer.direct else optimizer.on_device
    kind = optimizer.kind
    found, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    every = (p for g in optimizer.param_groups for p in g["params"])
    if optimizer.max_grad_norm is not None and any(map(is_dtensor, every)):
        return "a shard does not know the norm to clip to"
    damped = indirect is None and kind == SGD
    if found is not None and damped and any(w.states and w.settings.two for w in works):
        return "dampening under a loss scale"
    if backend == "cuda":
        reason = cuda.available()
        if reason is not None:
            return reason
        rows = _rows(works)
        if isinstance(rows, str):  # the counts, before the first step
            works = list(map(_steps_moved, works))
            rows = _rows(works)
        if isinstance(rows, str):
            return rows
        if indirect is None:
            norm = cuda.run(kind, works, rows, rates, scale, found, optimizer.max_grad_norm)
        else:
            moved = list(map(_with_rate, works, rates))
            norm = indirect(moved, scale, found, optimizer.max_grad_norm, cuda)
    else:
        reason = triton.refuses(works)
        if reason is not None:
            return reason
        moved = [_steps_moved(_with_rate(w, r)) for w, r in zip(works, rates, strict=True)]
        most = optimizer.max_grad_norm
        if indirect is not None:
            norm = indirect(moved, scale, found, most, triton)
        else:
            norm = triton.run_works(kind, moved, scale, found, most)
    optimizer.grad_norm = norm
    return None


def _rows(works: list[Work]) -> bytes | str:
    """cuda.rows_of for settings of whatever kind: the rows do not say them."""
    return cuda.rows_of([work._replace(settings=Settings(1.0)) for work in works])


def _with_rate(work: Work, rate: Tensor | None) -> Work:
    if rate is None:
        return work
    return work._replace(settings=work.settings._replace(lr=float(rate)))


def _steps_moved(work: Work) -> Work:
    """The same with its counts on the parameters' device, where they are read."""
    if work.steps is None:
        return work
    for p, own in zip(work.params, work.own, strict=True):
        if own["step"].device != p.device:
            own["step"] = own["step"].to(p.device)
    return work._replace(steps=[own["step"] for own in work.own])
