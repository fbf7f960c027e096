"""Measures one row: a subject's scenario in one direction, on a number of threads."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastllm.cli.bench.ops import Inputs, bound, cost, stock
from fastllm.cli.bench.plan import Item
from fastllm.core.limits import Limits, arithmetic, copying
from fastllm.core.measure import Measurement, interleave, one_line, quartiles
from fastllm.core.op import Op
from fastllm.core.subject import Trial

OURS, EAGER, COMPILED, COPY = "fastllm", "eager", "compiled", "copy"
_BARE = "bare arithmetic"
TIE = 0.03  # closer to 1 than this, a ratio is called even
_COPIED = 256 << 20  # bytes: a copy of more than this runs at the same speed
_TINY = 1 << 10  # bytes moved: a case to read a call's overhead from


@dataclass
class Row:
    """One measured row. Ratios say how many times faster ours is: median, lower, upper quartile.

    `limit_share` is the least time that the bytes (at the speed of a copy beside it) or the
    operations (at the fastest product's rate in the run) need, over ours; `bound` says which.
    `peak_share` is for the operations alone: on a CPU against multiply-adds on registers, timed
    beside ours.
    """

    op: str
    family: str
    case: str
    dtype: str
    direction: str
    threads: int | None
    backend: str
    nbytes: int
    flops: int
    warm: bool
    rounds: int = 0
    microseconds: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, list[float]] = field(default_factory=dict)
    speedup: dict[str, list[float]] = field(default_factory=dict)
    bound: str | None = None
    limit_share: float | None = None
    peak_share: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def losses(self) -> list[str]:
        """What is faster than ours by more than a tie: the copy is a limit, not a rival."""
        return [n for n, x in self.speedup.items() if n != COPY and x[0] < 1 - TIE]

    def json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self) | {"losses": self.losses}


def measure(
    item: Item,
    device: str,
    seconds: float,
    compiled: bool | str,
    limits: Limits | None,
    tick: Callable[[str], Any] = lambda what: None,
) -> Row:
    """The row of `item`. `compiled`: whether to time torch.compile, or the reason why not.

    What cannot be proven, or not even be set up, becomes a row that says so.
    """
    scenario, name = item.scenario, f"{item.subject.name} {item.scenario.name}"
    tick(f"proving {name}")
    wrong = scenario.wrong(device)
    tick(f"{name} {item.direction}")
    try:
        trial = scenario.trial(device, item.direction)
    except Exception as error:
        trial = None
        wrong = wrong or f"{name} {item.direction}: {one_line(error)}"
    row = Row(
        item.subject.name,
        item.subject.family,
        scenario.name,
        str(scenario.dtype).removeprefix("torch."),
        item.direction,
        item.threads,
        trial.backend if trial else "-",
        trial.nbytes if trial else scenario.nbytes,
        trial.flops if trial else 0,
        trial is not None and trial.sets == 1 and not trial.cold,
        wrong=wrong,
    )
    if wrong or trial is None:
        return row
    candidates = _candidates(trial, device, compiled, row.absent)
    counts = trial.counts or scenario.dtype
    bare = arithmetic(counts, device, item.threads) if row.flops else None
    if bare is not None:
        candidates[_BARE] = bare[0]
    found = interleave(
        candidates, sets=trial.sets, device=device, budget=seconds, threads=item.threads
    )
    peak = None
    if bare is not None and OURS in found.samples:
        peak = row.flops / bare[1] * found.speedup(OURS, over=_BARE).value
    found.samples.pop(_BARE, None)
    return _fill(row, found, limits, peak)


def _candidates(
    trial: Trial, device: str, compiled: bool | str, absent: dict[str, str]
) -> dict[str, Any]:
    found = {OURS: trial.ours, **trial.stock}
    found[COPY] = copying(min(trial.nbytes, _COPIED), device)
    if compiled is True:
        found |= trial.compiled
    elif compiled:
        absent |= dict.fromkeys(trial.compiled, compiled)
    return found | dict(trial.peers)


def _fill(row: Row, found: Measurement, limits: Limits | None, peak: float | None) -> Row:
    row.rounds = found.rounds
    row.absent |= found.failed
    more = max(row.nbytes / _COPIED, 1.0)  # a copy that was cut short stands for a whole one
    for name, samples in found.samples.items():
        scale = more * 1e6 if name == COPY else 1e6
        low, middle, high = (_digits(scale * x) for x in quartiles(samples))
        row.microseconds[name], row.quartiles[name] = middle, [low, high]
    if OURS not in found.samples:
        row.wrong = f"{row.op} {row.case}: {found.failed[OURS]}"
        return row
    for name in found.samples:
        if name != OURS:
            x = found.speedup(OURS, over=name)
            scale = more if name == COPY else 1.0
            row.speedup[name] = [_digits(scale * v) for v in (x.value, x.low, x.high)]
    _limit(row, limits, peak)
    return row


def _limit(row: Row, limits: Limits | None, share: float | None) -> None:
    """Which limit the row runs into, and how much of it ours reaches; `share`: of the peak."""
    moving = row.speedup.get(COPY, [0.0])[0]
    peak = limits.peak(row.dtype) if limits else 0.0
    counting = row.flops / peak / (row.microseconds[OURS] / 1e6) if peak else 0.0
    if share is not None or counting:
        row.peak_share = _digits(counting if share is None else share)
    if max(moving, counting) > 0:
        row.bound = "compute" if counting > moving else "memory"
        row.limit_share = _digits(max(moving, counting))


def tiny_case(op: Op) -> Any:
    """The case to read a call's overhead from, or None."""
    cases = [c for c in op.cases if "bench" in c.tags]
    return next((c for c in cases if cost(op, c).forward_bytes <= _TINY), None)


def measure_overhead(
    op: Op, threads: int | None, device: str, seconds: float
) -> dict[str, float | str]:
    """Microseconds a call on a tiny input: the public function, the backend, stock."""
    case = tiny_case(op)
    entry: dict[str, float | str] = {"op": op.name, "case": case.name}
    plain = Inputs(op, case, device, "forward")
    direct, theirs = op.select(plain.args).forward, stock(op)
    calls = {
        "no grad": bound(op, plain.args),
        "no grad, backend direct": lambda: direct(*plain.args),
        "no grad, eager": lambda: theirs(*plain.args),
        "empty": lambda: None,
    }
    if op.gradients:
        tracked = Inputs(op, case, device, "forward+backward").args
        calls["grad"] = bound(op, tracked)
        calls["grad, eager"] = lambda: theirs(*tracked)
    found = interleave(
        {name: _constant(call) for name, call in calls.items()},
        device="cpu",  # the host's clock on a GPU, too: this is about what a call costs the host
        budget=seconds,
        threads=threads,
    )
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    nothing = found.seconds("empty")
    for name in found.samples:
        if name != "empty":
            entry[name] = _digits(max(found.seconds(name) - nothing, 0.0) * 1e6)
    return entry


def _constant(call: Callable[[], Any]) -> Callable[[], Callable[[int], Any]]:
    return lambda: lambda i: call()


def _digits(value: float) -> float:
    """Four significant digits: more would be noise in the stored file."""
    return float(f"{value:.4g}")
