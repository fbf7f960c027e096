"""What there is to measure: calls of ops, each backend that can serve them against the others."""

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm._C import Head, call_key
from fastllm.core.backend import Backend
from fastllm.core.measure import Call, Factory, copies, rotation, size_of, thread_count
from fastllm.core.op import OPS, Op
from fastllm.core.proof import wants_grad
from fastllm.core.tuner import follow, routes, table
from fastllm.core.tuner.search import Change, Job, Trial, search
from fastllm.core.tuner.tunable import TUNABLES, Config, Tunable

Build = Callable[[], tuple]  # makes an op's arguments

_MOST_SETS = 64  # making more copies of mid-sized inputs would take longer than timing them


@dataclass(frozen=True)
class Sighting:
    """One call that is worth tuning: an op, how to make its arguments, in which direction."""

    op: Op
    build: Build
    direction: str
    device: str = "cpu"


def of_cases(ops: Iterable[Op], device: str, tags: frozenset[str] = frozenset()) -> list[Sighting]:
    """The ops' own CASES, in both directions; with `tags`, those that have one of them."""
    found = []
    for op in ops:
        for case in op.cases:
            if tags and not tags & case.tags:
                continue

            def build(case: Any = case) -> tuple:
                return case.args(device)

            both = (routes.FORWARD, routes.TRAINING) if op.gradients else (routes.FORWARD,)
            found += [Sighting(op, build, direction, device) for direction in both]
    return found


def jobs_of(sightings: Iterable[Sighting], device: str, threads: int | None = None) -> list[Job]:
    """One job a key: sightings that fall into the same bucket are decided together."""
    device = table.device_name(device)
    grouped: dict[tuple[str, str], list[Sighting]] = {}
    keys: dict[Build, str | None] = {}  # both directions of a case have the same arguments
    with thread_count(threads if device == "cpu" else None):
        for seen in sightings:
            if seen.build not in keys:
                args = seen.build()
                worth = _worth_it(seen.op, args)
                keys[seen.build] = routes.call_word(seen.op, args, device) if worth else None
            key = keys[seen.build]
            if key is not None:
                grouped.setdefault((f"{seen.op.name}.{seen.direction}", key), []).append(seen)
    return [
        Job(device, name, group[0].op.family, key, tuple(map(_trial, group)), threads)
        for (name, key), group in grouped.items()
    ]


def _worth_it(op: Op, args: tuple) -> bool:
    """Whether there is something in it, and more than one way to run it."""
    tensors = [args[i] for i in op.tensors if isinstance(args[i], Tensor)]
    # an empty vector stands for none: zero points that a format does not have
    full = all(t.numel() or t.shape == (0,) for t in tensors)
    return full and len(rivals(op, args)) > 1


def rivals(op: Op, args: tuple) -> list[Backend]:
    """The backends that can serve a call; the reference never wins."""
    found = [op.named(name, args) for name in op.backends if name != "reference"]
    return [run for run in found if run is not None]


def _trial(seen: Sighting) -> Callable[[], Trial]:
    def make() -> Trial:
        op, args = seen.op, seen.build()
        wanted = [i for i in sorted(op.gradients) if wants_grad(op, i, args[i])]
        training = seen.direction == routes.TRAINING
        upstream: tuple[Tensor, ...] = ()
        if training:
            args = _wanting(op, args)
            upstream = tuple(torch.randn_like(o) for o in _outputs(op(*args, backend="torch")))
        device = next(args[i].device for i in op.tensors if isinstance(args[i], Tensor))
        sets = min(_MOST_SETS, rotation(size_of((args, upstream)), device))
        inputs = copies((args, upstream), sets)
        usual = op.default(args, training).name
        runs = sorted(rivals(op, args), key=lambda run: run.name != usual)  # the default first
        calls = {b.name: _factory(op, b, inputs, wanted if training else None) for b in runs}
        return Trial(calls, sets)

    return make


def _factory(op: Op, run: Backend, inputs: list[tuple], wanted: list[int] | None) -> Factory:
    """A call as the table would have it run, the price of asking the table included."""
    fixed = routes.fixed(op, run)

    def forward(i: int) -> Any:
        before, op.routes = op.routes, fixed
        try:
            return op(*inputs[i][0])
        finally:
            op.routes = before

    def both(i: int) -> Any:
        args, upstream = inputs[i]
        outputs = _outputs(forward(i))
        return torch.autograd.grad(outputs, [args[k] for k in wanted or ()], upstream)

    def inference(i: int) -> Any:
        with torch.no_grad():
            return forward(i)

    def make() -> Call:
        return inference if wanted is None else both

    return make


def _outputs(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


# ---- calls that a model makes


class _Recorder(Head):
    """Stands in for an op's routes: notes the calls, and lets each take the default."""

    def __init__(self, op: Op, into: dict[tuple[str, str], Sighting]) -> None:
        super().__init__(None)
        self.op, self.into = op, into

    def __call__(self, *args: Any) -> Any:
        self.find(args)
        return NotImplemented

    def find(self, args: tuple, training: bool | None = None, /) -> None:
        number = call_key(args, training)
        device = None if number is None else routes.device_of(self.op, args)
        if number is not None and device is not None:
            direction = routes.TRAINING if number & 1 else routes.FORWARD
            try:
                self.op.check(*args)
                key = (f"{self.op.name}.{direction}", f"{number}")
            except (AttributeError, TypeError, ValueError):
                return
            if key not in self.into:
                self.into[key] = Sighting(self.op, _rebuild(args), direction, device)


@dataclass(frozen=True)
class Seen:
    """What a program called: ops with their arguments, and tunables' sizes by device."""

    calls: list[Sighting]
    sizes: dict[str, dict[str, set[tuple]]]

    @property
    def devices(self) -> list[str]:
        """The devices that were used."""
        return sorted({s.device for s in self.calls} | set(self.sizes))

    def on(self, device: str) -> list[Sighting]:
        """The calls of one device."""
        return [s for s in self.calls if s.device == device]


def record(run: Callable[[], Any]) -> Seen:
    """The different calls of fastllm's ops and tunables that `run()` makes."""
    into: dict[tuple[str, str], Sighting] = {}
    before = {op: op.routes for op in OPS.values()}
    sizes: dict[str, dict[str, set[tuple]]] = {}
    try:
        for op in before:
            op.routes = _Recorder(op, into)
        for tunable in TUNABLES.values():
            tunable.seen = set()
        run()
    finally:
        for op, was in before.items():
            op.routes = was
        for tunable in TUNABLES.values():
            for device, found in tunable.seen or ():
                sizes.setdefault(device, {}).setdefault(tunable.name, set()).add(found)
            tunable.seen = None
    return Seen(list(into.values()), sizes)


def _rebuild(args: tuple) -> Build:
    """Makes arguments like these later: random values in the same layout; integers as they were."""
    recipes = [_recipe(a) if isinstance(a, Tensor) else a for a in args]
    return lambda: tuple(r() if callable(r) else r for r in recipes)


def _recipe(tensor: Tensor) -> Callable[[], Tensor]:
    if not tensor.is_floating_point():
        kept = tensor.detach().clone()
        return lambda: kept.clone()
    shape, strides = tuple(tensor.shape), tensor.stride()
    dtype, device = tensor.dtype, tensor.device
    size = (
        1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if tensor.numel() else 0
    )

    def make() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=generator).to(device, dtype).as_strided(shape, strides)

    return make


# ---- configs


def of_tunables(
    tunables: Iterable[Tunable], device: str, threads: int | None = None, seen: Any = None
) -> list[Job]:
    """A job for each bucket of sizes: those `seen`, else the tunable's own samples."""
    device = table.device_name(device)
    found: dict[tuple[str, str], Job] = {}
    with thread_count(threads if device == "cpu" else None):
        for tunable in tunables:
            if tunable.kind not in (None, torch.device(device).type):
                continue
            mine = tunable.samples if seen is None else seen.get(tunable.name, ())
            for sizes in mine:
                configs = tunable.candidates(device, sizes)
                key = (tunable.name, tunable.word(device, sizes))
                if len(configs) < 2 or key in found:
                    continue
                make = functools.partial(_config_trial, tunable, device, sizes, configs)
                found[key] = Job(
                    device, tunable.name, tunable.family, key[1], (make,), threads, dict(configs)
                )
    return list(found.values())


def sizes_of(sightings: Iterable[Sighting]) -> dict[str, set[tuple]]:
    """The sizes for which these calls ask tunables, by name: each is run once to see."""
    last = {seen.build: seen for seen in sightings}  # training, which is forward and more

    def once() -> None:
        for seen in last.values():
            args = seen.build()
            if not _worth_it(seen.op, args):
                continue
            if seen.direction == routes.TRAINING:
                outputs = _outputs(seen.op(*_wanting(seen.op, args)))
                torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
            else:
                seen.op(*args)

    return {name: found for sizes in record(once).sizes.values() for name, found in sizes.items()}


def _wanting(op: Op, args: tuple) -> tuple:
    """`args` of which all that can have a gradient want one."""
    return tuple(
        a.detach().requires_grad_() if wants_grad(op, i, a) else a for i, a in enumerate(args)
    )


def _config_trial(tunable: Tunable, device: str, sizes: tuple, configs: dict[str, Config]) -> Trial:
    args = tunable.build(torch.device(device), *sizes)
    sets = rotation(size_of(args), device)
    inputs = copies(args, sets)

    def factory(config: Config) -> Factory:
        return lambda: lambda i: tunable.run(config, *inputs[i])

    return Trial({name: factory(config) for name, config in configs.items()}, sets)


# ---- measured while a program runs: FASTLLM_TUNE=on

_busy = threading.Lock()


def measure_call(op: Op, args: tuple, direction: str) -> Change | None:
    """Measures one call that no table knows; None where that is not the time for it."""
    device = routes.device_of(op, args)
    if device is None or not _calm(device):
        return None
    seen = Sighting(op, _rebuild(args), direction, device)
    return _now(lambda: jobs_of([seen], device))


def measure_config(tunable: Tunable, device: str, sizes: tuple) -> Change | None:
    """The same of a kernel's config."""
    if not _calm(device):
        return None
    return _now(lambda: of_tunables([tunable], device, seen={tunable.name: [sizes]}))


def _now(jobs: Callable[[], list[Job]]) -> Change | None:
    if not _busy.acquire(blocking=False):  # while something is measured, nothing else is
        return None
    try:
        return next(search(jobs()), None)
    finally:
        _busy.release()


def _calm(device: str) -> bool:
    """No other rank that would have to do the same, no CUDA graph being captured."""
    if follow.ranks() > 1:
        return False
    return device == "cpu" or not torch.cuda.is_current_stream_capturing()
