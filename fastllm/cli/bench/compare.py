"""Two stored runs side by side: what became slower or faster by more than both runs' noise.

Runs differ by what else the machine did, so seconds are not compared. A row's yardsticks are timed
in the same rounds as ours: stock eager and a plain copy. A change counts when the quartiles of the
two runs do not overlap, by more than a tie, against *every* yardstick that both have: a new torch
that is faster does not make ours slower.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fastllm.cli.app import CliError
from fastllm.cli.bench import results
from fastllm.cli.bench.rows import COPY, EAGER, TIE
from fastllm.cli.console import table

YARDSTICKS = (EAGER, COPY)
_Key = tuple[str, str, str, int | None]


@dataclass(frozen=True)
class Change:
    """One row in both runs: how the ratios to the yardsticks moved, and the verdict on it."""

    key: _Key
    verdict: str  # "slower", "faster", "same", "broken", "repaired"
    moved: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """All rows of two runs, those that only one of them has included."""

    changes: list[Change]
    only_first: list[_Key]
    only_second: list[_Key]

    def of(self, *verdicts: str) -> list[Change]:
        """The rows with one of these verdicts."""
        return [c for c in self.changes if c.verdict in verdicts]

    @property
    def regressions(self) -> list[Change]:
        """Rows that are slower, or wrong where they were right."""
        return self.of("slower", "broken")


def run(first: Path, second: Path, force: bool, console: Console) -> int:
    """Compares, prints; 1 when something regressed."""
    before, after = results.read(first), results.read(second)
    _same_device(before, after, force)
    found = compare(before, after)
    if not found.changes:
        raise CliError(f"--compare: {first} and {second} have no row in common")
    _print(console, found, first, second)
    return 1 if found.regressions else 0


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """What changed from one run to the other."""
    old = {results.key(row): row for row in before["rows"]}
    new = {results.key(row): row for row in after["rows"]}
    return Comparison(
        [_change(key, old[key], new[key]) for key in old if key in new],
        [key for key in old if key not in new],
        [key for key in new if key not in old],
    )


def _change(key: _Key, old: dict[str, Any], new: dict[str, Any]) -> Change:
    if old["wrong"] or new["wrong"]:
        verdict = "same" if old["wrong"] and new["wrong"] else "repaired"
        return Change(key, "broken" if new["wrong"] and not old["wrong"] else verdict)
    shared = [y for y in YARDSTICKS if y in old["speedup"] and y in new["speedup"]]
    moved = {y: (old["speedup"][y][0], new["speedup"][y][0]) for y in shared}
    if shared and all(_below(new["speedup"][y], old["speedup"][y]) for y in shared):
        return Change(key, "slower", moved)
    if shared and all(_below(old["speedup"][y], new["speedup"][y]) for y in shared):
        return Change(key, "faster", moved)
    return Change(key, "same", moved)


def _below(a: list[float], b: list[float]) -> bool:
    """Whether ratio `a` (median, quartiles) is below `b` by more than noise and a tie."""
    return a[2] < b[1] and a[0] < b[0] * (1 - TIE)


def _same_device(before: dict[str, Any], after: dict[str, Any], force: bool) -> None:
    differing = [
        f"{name} {before['device'].get(name)!r} and {after['device'].get(name)!r}"
        for name in ("type", "cpu", "cores", "isa", "gpu")
        if before["device"].get(name) != after["device"].get(name)
    ]
    if differing and not force:
        raise CliError(
            f"--compare: the runs are of different devices: {'; '.join(differing)} "
            "(--force compares them all the same)"
        )


def _print(console: Console, found: Comparison, first: Path, second: Path) -> None:
    shown = found.of("slower", "faster")
    if shown:
        columns = ("", "row", *(f"vs {y}, before" + " -> after" for y in YARDSTICKS))
        made = table(f"{first} -> {second}", *columns, right=(2, 3))
        for change in sorted(shown, key=lambda c: c.verdict, reverse=True):
            style = "bold red" if change.verdict == "slower" else "green"
            cells = [_moved(change, y) for y in YARDSTICKS]
            made.add_row(f"[{style}]{change.verdict}[/]", _name(change.key), *cells)
        console.print(made)
    for change in found.of("broken", "repaired"):
        console.print(f"  {change.verdict}: {_name(change.key)}", markup=False)
    _only(console, found.only_first, first)
    _only(console, found.only_second, second)
    counts = ", ".join(
        f"{len(found.of(v))} {v}" for v in ("slower", "broken", "faster", "repaired", "same")
    )
    console.print(f"{len(found.changes)} rows in both: {counts}")


def _only(console: Console, keys: Iterable[_Key], path: Path) -> None:
    for key in keys:
        console.print(f"  only in {path}: {_name(key)}", style="dim", markup=False)


def _moved(change: Change, yardstick: str) -> str:
    if yardstick not in change.moved:
        return "-"
    old, new = change.moved[yardstick]
    return f"{old:.2f}x -> {new:.2f}x ({new / old - 1:+.0%})"


def _name(key: _Key) -> str:
    op, case, direction, threads = key
    return f"{op} {case} {direction}" + (f", {threads} thread(s)" if threads else "")
