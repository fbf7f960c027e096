"""One run: measures row after row within its budget, and stores what it has after each of them."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastllm.cli.bench import peers, report, results
from fastllm.cli.bench.budget import Budget
from fastllm.cli.bench.plan import Item, natural_order
from fastllm.cli.bench.rows import measure, measure_overhead, tiny_case
from fastllm.cli.console import progress
from fastllm.core.limits import Limits, measure_limits
from fastllm.core.op import OPS

_OVERHEAD = 0.2  # seconds of timing for what a call of one op costs


@dataclass(frozen=True)
class Settings:
    """How to measure: seconds for the whole run, and at most for one row; whether to compile."""

    device: str = "cpu"
    budget: float = 240.0
    most: float = 0.25
    compile: bool = True


class Session:
    """A run in the making. `found` is what is stored; `pending` the items that are not in it."""

    def __init__(
        self,
        items: Sequence[Item],
        settings: Settings,
        console: Console,
        files: Sequence[Path] = (),
        earlier: dict[str, Any] | None = None,
    ) -> None:
        self.items, self.settings = list(items), settings
        self.console, self.files = console, list(files)
        fresh = results.header(settings.device) | {
            "complete": False,
            "planned": len(self.items),
            "seconds": 0.0,
            "limits": [],
            "rows": [],
            "overhead": [],
            "absent": peers.absent(settings.device),
        }
        self.found = earlier or fresh
        self._places = {key: place for place, key in enumerate(natural_order(self.items))}
        self._before = self.found["seconds"]
        self._begin = time.monotonic()

    @property
    def pending(self) -> list[Item]:
        """What is still to be measured."""
        done = {results.key(row) for row in self.found["rows"]}
        return [item for item in self.items if item.key not in done]

    def run(self) -> dict[str, Any]:
        """Measures until all is done or the budget is spent; KeyboardInterrupt ends it early."""
        with _terminated_is_interrupted(), progress() as bars:
            bar = bars.add_task("limits of this machine", total=len(self.items))

            def tick(what: str) -> None:
                done = len(self.found["rows"])
                bars.update(bar, description=what, completed=done)

            overheads = self._overheads()
            self._limits()
            pending = self.pending
            reserve = len(overheads) * 2 * _OVERHEAD
            budget = Budget(
                self.settings.budget - reserve - (time.monotonic() - self._begin),
                [item.rank for item in pending],
                self.settings.most,
            )
            self._rows(pending, budget, tick)
            if not self.pending:
                tick("what a call costs")
                self._measure_overheads(overheads)
                self.found["complete"] = True
            self.save()
        return self.found

    def save(self) -> None:
        """Stores what there is, so that nothing is lost whatever happens next."""
        self.found["seconds"] = round(self._before + time.monotonic() - self._begin, 1)
        self.found["rows"].sort(key=lambda row: self._places.get(results.key(row), -1))
        for path in self.files:
            results.write(path, self.found)

    def _rows(self, pending: list[Item], budget: Budget, tick: Callable[[str], None]) -> None:
        for place, item in enumerate(pending):
            if not budget.enough():
                return
            begin, timing = time.monotonic(), budget.timing()
            compiled = self._compiled(budget)
            row = measure(
                item, self.settings.device, timing, compiled, self._limits_of(item.threads), tick
            )
            budget.spent(time.monotonic() - begin, timing, "compiled" in row.microseconds)
            self.found["rows"].append(row.json())
            self.save()
            following = pending[place + 1] if place + 1 < len(pending) else None
            if following is None or _chunk(following) != _chunk(item):
                self._print([x.key for x in pending[: place + 1] if _chunk(x) == _chunk(item)])

    def _compiled(self, budget: Budget) -> bool | str:
        if not self.settings.compile:
            return "left out: --no-compile"
        return True if budget.compiles() else "left out: compiling did not fit into the budget"

    def _print(self, keys: Sequence[tuple]) -> None:
        rows = [row for row in self.found["rows"] if results.key(row) in keys]
        self.console.print(report.terminal(rows[0]["op"], rows))
        report.print_wrong(self.console, rows)

    def _limits(self) -> None:
        known = {entry["threads"] for entry in self.found["limits"]}
        for count in dict.fromkeys(item.threads for item in self.items):
            threads = count or torch.get_num_threads()
            if threads not in known:
                seconds = min(max(self.settings.budget / 40, 0.5), 4.0)
                found = measure_limits(self.settings.device, count, seconds)
                self.found["limits"].append(results.limits_entry(found))
        report.print_limits(self.console, self.found["limits"])

    def _limits_of(self, count: int | None) -> Limits | None:
        threads = count or torch.get_num_threads()
        entries = [e for e in self.found["limits"] if e["threads"] == threads]
        return results.limits(entries[0]) if entries else None

    def _overheads(self) -> list[str]:
        """Names of the ops whose cost of a call is still to be measured."""
        known = {entry["op"] for entry in self.found["overhead"]}
        names = dict.fromkeys(item.subject.name for item in self.items)
        return [n for n in names if n in OPS and n not in known and tiny_case(OPS[n])]

    def _measure_overheads(self, names: Sequence[str]) -> None:
        threads, device = self.items[0].threads, self.settings.device
        for name in names:
            entry = measure_overhead(OPS[name], threads, device, _OVERHEAD)
            self.found["overhead"].append(entry)


def _chunk(item: Item) -> tuple[int, str]:
    """Rows that are printed as one table, as soon as they are complete."""
    return (item.wave, item.subject.name)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Within the block, being asked to terminate ends the run as Ctrl-C does: in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
