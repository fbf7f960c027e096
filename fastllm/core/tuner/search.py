"""Candidates against one another, and what wins; nothing in here runs on an ordinary call."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastllm.core.measure import Factory, Measurement, interleave
from fastllm.core.tuner import table

TIE = 1.02  # a candidate this close to the best one is as good: then the default stays
_CLEAR = 10  # a lead of so many standard errors needs no more rounds
_FINALISTS = 4  # of many candidates, these are measured well


@dataclass(frozen=True)
class Trial:
    """Inputs of one shape: the candidates on them, the default first, and how many input sets."""

    candidates: dict[str, Factory]
    sets: int = 1


@dataclass(frozen=True)
class Job:
    """One entry of the table to be. Each of `trials` makes the inputs of one shape in its bucket.

    `values` is what the table says for a candidate, where that is more than its name.
    """

    device: str
    name: str
    family: str
    key: str
    trials: tuple[Callable[[], Trial], ...]
    threads: int | None = None
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def known(self) -> Any:
        """The table's value for it, if it has one."""
        return table.lookup(self.device, self.name, self.family, self.key)


@dataclass(frozen=True)
class Change:
    """What tuning decided for one key: `ratio` is how many times faster than the default."""

    name: str
    key: str
    device: str
    before: Any
    after: Any
    ratio: float
    seconds: dict[str, float]

    @property
    def changed(self) -> bool:
        """Whether another choice is in force now."""
        return self.before != self.after


def measure(job: Job, budget: float) -> Change | None:
    """Measures a job; None when there is nothing to choose between on this machine.

    Random inputs are drawn aside: the caller's random state stays as it is.
    """
    devices = [] if job.device == "cpu" else [job.device]
    with torch.random.fork_rng(devices=devices):
        return _measure(job, budget)


def _measure(job: Job, budget: float) -> Change | None:
    found, default = _heats(job, None, budget)
    common = _common(found)
    if len(common) < 2:
        return None
    times, doubt = _quotients(found, default)
    winner = decide(times, default, doubt)
    if winner != default and default in common:  # what a hiccup brought is not found twice
        found, _ = _heats(job, (default, winner), 2 * budget)
        if _common(found) == {default, winner}:
            times, doubt = _quotients(found, default)
            winner = decide(times, default, doubt)
    base = default if default in common else min(common)
    ratio = min(t.get(base, 1.0) / t[winner] for t in times)
    before = job.known
    named = job.values.get(default, default)
    return Change(
        job.name,
        job.key,
        job.device,
        named if before is None else before,
        job.values.get(winner, winner),
        ratio,
        {name: found[0].seconds(name) for name in sorted(_common(found))},
    )


def _heats(job: Job, names: Iterable[str] | None, budget: float) -> tuple[list[Measurement], str]:
    """Rounds on every shape of a job, of all candidates or those named; and the default's name."""
    found: list[Measurement] = []
    default = ""
    for make in job.trials:
        trial = make()
        default = next(iter(trial.candidates))
        if names is not None:
            trial = Trial({n: trial.candidates[n] for n in names}, trial.sets)
        found.append(_rounds(trial, job, default, budget / len(job.trials)))
    return found, default


def _common(found: Sequence[Measurement]) -> set[str]:
    return set.intersection(*({*m.samples} for m in found))


def _quotients(
    found: Sequence[Measurement], default: str
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """(what each candidate takes in units of the default, how far each of that may be off).

    From quotients within a round: a machine that slows down in between slows all down.
    """
    common = _common(found)
    base = default if default in common else min(common)
    times: list[dict[str, float]] = []
    doubt = dict.fromkeys(common, 0.0)
    for measurement in found:
        ratios = {name: measurement.speedup(name, over=base) for name in common}
        times.append({name: 1 / r.value for name, r in ratios.items()})
        for name, r in ratios.items():  # twice a median's standard error, were it normal
            error = 1.86 * (r.high - r.low) / r.value / math.sqrt(measurement.rounds)
            doubt[name] = max(doubt[name], error)
    return times, doubt


def decide(
    times: Sequence[dict[str, float]], default: str, doubt: Mapping[str, float] | None = None
) -> str:
    """The candidate that is never far from the best one, over all shapes of a bucket.

    `times` has a dict a shape: what each candidate takes, in any unit. The default stays where
    the best one leads by no more than TIE and the `doubt` about it (a share of its time).
    """

    def regret(name: str) -> float:
        return max(t[name] / min(t.values()) for t in times)

    best = min(times[0], key=regret)
    lead = TIE + (doubt or {}).get(best, 0.0)
    if default in times[0] and regret(default) <= lead * regret(best):
        return default
    return best


def _rounds(trial: Trial, job: Job, default: str, budget: float) -> Measurement:
    """Interleaved rounds; where there are many candidates, a short heat comes first."""
    some = trial.candidates

    def run(names: Iterable[str], budget: float, rounds: int) -> Measurement:
        return interleave(
            {name: some[name] for name in names},
            sets=trial.sets,
            device=job.device,
            budget=budget,
            threads=job.threads,
            min_rounds=rounds,
            clear=_CLEAR,
        )

    if len(some) <= _FINALISTS + 1:
        return run(some, budget, 5)
    heat = run(some, budget / 2, 3)
    order = sorted(heat.samples, key=heat.seconds)[:_FINALISTS]
    final = run(dict.fromkeys([default, *order]), budget / 2, 5)
    return Measurement(final.samples, final.sets, {**heat.failed, **final.failed})


def search(
    jobs: Sequence[Job],
    budget: float | None = None,
    each: float = 0.15,
    again: bool = False,
    keep: bool = True,
    tick: Callable[[Job], Any] = lambda job: None,
) -> Iterator[Change]:
    """Measures every job that the table does not know (all of them when `again`).

    What is found is written at once: an interrupt loses the job it falls into, nothing else.
    `budget` seconds for all; `each` for one at most.
    """
    end = None if budget is None else time.monotonic() + budget
    for job in jobs:
        if end is not None and time.monotonic() >= end:
            return
        tick(job)
        if not again and job.known is not None:
            continue
        change = measure(job, each)
        if change is None:
            continue
        new = table.entry(job.family, job.device, change.after, change.seconds)
        table.learn(job.device, {job.name: {job.key: new}}, keep)
        yield change
