"""One step's work, and who does it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.errors import UnsupportedError
from fastllm.optim import cpu, reference, states
from fastllm.optim.settings import Settings


class Work(NamedTuple):
    """One group's tensors that have a gradient. Lists have an entry for each, or are empty/None."""

    settings: Settings
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    scales: list[list[Tensor | None]]
    masters: list[Tensor | None] | None
    steps: list[Tensor] | None
    fresh: list[bool] | None
    numbers: list[int]
    own: list[dict[str, Any]]
    names: tuple[str, ...]
    who: str

    def only(self, keep: list[int]) -> "Work":
        """The same for some of the tensors."""

        def pick(values: Any) -> Any:
            return values and [values[i] for i in keep]

        return self._replace(
            params=pick(self.params), grads=pick(self.grads),
            states=[pick(s) for s in self.states], scales=[pick(s) for s in self.scales],
            masters=pick(self.masters), steps=pick(self.steps), fresh=pick(self.fresh),
            numbers=pick(self.numbers), own=pick(self.own),
        )  # fmt: skip


def run(kind: int, works: list[Work], backend: str | None) -> str | None:
    """Updates everything on `backend` or the best one; returns the name of what ran.

    On the CPU the kernels take every tensor that they can read, plain torch the rest.
    """
    if backend == "reference":
        return _plain(kind, works)
    if backend not in (None, "cpu"):
        raise UnsupportedError(f"{works[0].who}: there is no backend {backend!r}")
    rest = cpu.run(kind, works)
    if rest and backend == "cpu":
        odd = ", ".join(f"{p.dtype}{list(p.shape)} on {p.device}" for w in rest for p in w.params)
        raise UnsupportedError(f"{rest[0].who}: backend 'cpu' cannot serve {odd}")
    if rest:
        _plain(kind, rest)
    return "cpu" if rest is not works else "reference"


@torch.no_grad()
def _plain(kind: int, works: list[Work]) -> str:
    """One tensor at a time in plain torch, in float32 or the parameter's own wider dtype."""
    for work in works:
        for i, (param, grad) in enumerate(zip(work.params, work.grads, strict=True)):
            _plain_one(kind, work, i, param, grad)
    return "reference"


def _plain_one(kind: int, work: Work, i: int, param: Tensor, grad: Tensor) -> None:
    if grad.is_sparse:
        raise RuntimeError(f"{work.who} does not support sparse gradients")
    step = work.steps[i] if work.steps else None
    time = 0.0 if step is None else float(step) + 1
    master = work.masters[i] if work.masters else None
    wide = torch.float32 if param.dtype in states.LOW else param.dtype
    key = states.key_of(work.settings.seed, work.numbers[i], int(time))
    p = master if master is not None else param.to(wide)
    decoded = [_read(work, i, k, wide) for k in range(len(work.states))]
    views = [p, grad.to(wide), *decoded]
    if param.is_complex():
        views = [torch.view_as_real(v) for v in views]
    fresh = bool(work.fresh and work.fresh[i])
    reference.update(kind, work.settings, time, fresh, views[0], views[1], views[2:])
    for k, value in enumerate(decoded):
        _write(work, i, k, value, key)
    if work.settings.stochastic and master is None and param.dtype == torch.bfloat16:
        flat = states.flat(torch.empty_like(param))
        flat.copy_(states.round_bf16(states.flat(p), states.mixed(key)))
        param.copy_(flat.as_strided(p.shape, p.stride()))
    elif p is not param:
        param.copy_(p)
    if step is not None:
        step.fill_(time)


def _read(work: Work, i: int, place: int, wide: torch.dtype) -> Tensor:
    """A state as numbers of dtype `wide`: itself where it is that."""
    state = work.states[place][i]
    scale = work.scales[place][i] if place < len(work.scales) else None
    if scale is None:
        return state.to(wide)
    values = states.decode(states.flat(state), scale, _code(state, place))
    return values.as_strided(state.shape, state.stride())


def _write(work: Work, i: int, place: int, value: Tensor, key: int) -> None:
    state = work.states[place][i]
    scale = work.scales[place][i] if place < len(work.scales) else None
    if scale is not None:
        codes, scales = states.encode(states.flat(value), _code(state, place), key)
        states.flat(state.view(torch.uint8)).copy_(codes.view(torch.uint8))
        scale[: scales.numel()].copy_(scales)  # a shard may have more than it needs
    elif state.dtype == torch.bfloat16:
        states.flat(state).copy_(states.round_bf16(states.flat(value), key + place))
    elif value is not state:
        state.copy_(value)


def _code(state: Tensor, place: int) -> states.Code:
    for code in states.CODES.values():
        if code.dtype == state.dtype and code.signed == (place == 0):
            return code
    raise ValueError(f"state {place}: expected 8-bit codes, found {state.dtype}")
