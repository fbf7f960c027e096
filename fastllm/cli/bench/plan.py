"""What a run times, and in which order: what matters most first, since a budget may end it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastllm.cli.app import CliError
from fastllm.cli.bench import ops
from fastllm.core import subject
from fastllm.core.op import OPS
from fastllm.core.subject import Scenario, Subject

_ONE_THREAD = 1 << 20  # bytes moved: below, a kernel runs on one thread anyway

Key = tuple[str, str, str, int | None]


@dataclass(frozen=True)
class Item:
    """One row to be measured. Rows of a lower `wave` come first; `rank` orders compiling."""

    subject: Subject
    scenario: Scenario
    direction: str
    threads: int | None
    wave: int
    rank: int

    @property
    def key(self) -> Key:
        """What names the row in a stored run."""
        return (self.subject.name, self.scenario.name, self.direction, self.threads)


def subjects() -> list[Subject]:
    """All public ops that have a case to time, and all that is registered beyond ops."""
    found = [ops.subject(op) for op in OPS.values() if ops.public(op)]
    return [s for s in [*found, *subject.load().values()] if s.scenarios]


def plan(
    family: str | None = None,
    name: str | None = None,
    case: str | None = None,
    dtype: torch.dtype | None = None,
    quick: bool = False,
    threads: Sequence[int | None] = (None,),
) -> list[Item]:
    """The rows to measure, in order; CliError when nothing fits.

    First one scenario a dtype of everything, on all threads; a run that is not quick goes on with
    the other directions, the other scenarios, and one thread.
    """
    known = subjects()
    _known("family", "family", family, {s.family for s in known})
    _known("--op", "op", name, {s.name for s in known})
    items = []
    for s in known:
        if family in (None, s.family) and name in (None, s.name):
            fitting = [
                x for x in s.scenarios if dtype in (None, x.dtype) and (case or "") in x.name
            ]
            items += _items(s, fitting, threads)
    if not items:
        raise CliError("no case to time fits --op, --case and --dtype")
    return sorted((x for x in items if not quick or x.wave == 0), key=lambda x: x.wave)


def natural_order(items: Sequence[Item]) -> list[Key]:
    """The rows as a reader expects them: by subject, scenario, threads and direction."""
    names = list(dict.fromkeys(x.subject.name for x in items))

    def place(x: Item) -> tuple[int, ...]:
        s = x.subject
        scenario, direction = s.scenarios.index(x.scenario), s.directions.index(x.direction)
        return names.index(s.name), scenario, -(x.threads or 0), direction

    return [x.key for x in sorted(items, key=place)]


def thread_counts(device: str, asked: int | None, quick: bool) -> list[int | None]:
    """All threads and then one; what was asked for; or None on a GPU."""
    if torch.device(device).type != "cpu":
        return [None]
    everything = asked or torch.get_num_threads()
    return [everything] if asked or quick or everything == 1 else [everything, 1]


def _items(s: Subject, scenarios: Sequence[Scenario], threads: Sequence[int | None]) -> list[Item]:
    chosen = _representative(scenarios)
    first = s.quick or s.directions
    found = []
    for scenario in scenarios:
        for place, count in enumerate(threads):
            if place and scenario.nbytes < _ONE_THREAD:
                continue
            for direction in s.directions:
                wave = 3 if place else 2 if scenario not in chosen else int(direction not in first)
                main = scenario is chosen[-1] and direction == s.directions[-1]
                found.append(Item(s, scenario, direction, count, wave, 2 * wave + (not main)))
    return found


def _representative(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """One a dtype: the second largest, which outgrows a core's cache, but not patience."""
    chosen = []
    for dtype in dict.fromkeys(x.dtype for x in scenarios):
        ordered = sorted((x for x in scenarios if x.dtype == dtype), key=lambda x: x.nbytes)
        chosen.append(ordered[-2:][0])
    return chosen


def _known(argument: str, what: str, asked: str | None, names: set[str]) -> None:
    if asked is not None and asked not in names:
        raise CliError(
            f"{argument}: no {what} is called {asked!r}; there are {', '.join(sorted(names))}"
        )
