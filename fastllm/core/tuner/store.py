"""Tables in files: written by atomic rename under a lock, merged, set aside when broken.

    {"format": 1, "facts": {...}, "entries": {name: {key: {"value": ..., "source": ..., ...}}}}

Nothing in here raises for what it finds on the disk: a table is a convenience, not a need.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastllm.core.tuner.facts import Facts

try:
    import fcntl
except ImportError:  # no such locks on this system: renaming is still atomic
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
Entry = dict[str, Any]  # "value", "source", "seconds" by candidate
Entries = dict[str, dict[str, Entry]]


def read(path: Path, facts: Facts, mine: bool = True) -> Entries:
    """The entries of a file; empty where there is none, or none of use for these `facts`.

    A file of the user's (`mine`) that cannot be read is set aside, with a warning.
    """
    try:
        data = json.loads(path.read_bytes())
        problem = _problem(data, facts)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn(f"{path} cannot be read ({error}); it is not used")
        return {}
    except ValueError as error:
        problem = f"it is damaged: {error}"
    if problem:
        if mine:
            _set_aside(path, problem)
        return {}
    return data["entries"]


def _problem(data: Any, facts: Facts) -> str | None:
    """Why the contents of a file are not what belongs there, or None."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        return "it has another format"
    if data.get("facts") != facts:
        return "it is about another device or another version"
    entries = data.get("entries")
    good = isinstance(entries, dict) and all(
        isinstance(of, dict) and all(isinstance(e, dict) and "value" in e for e in of.values())
        for of in entries.values()
    )
    return None if good else "its entries have another form"


def _set_aside(path: Path, problem: str) -> None:
    away = path.with_name(path.name + ".set-aside")
    try:
        os.replace(path, away)
    except OSError:  # a read-only folder: then it is only not used
        away = path
    _warn(f"the tuning table {path.name} is not used: {problem} (kept as {away})")


def _warn(text: str) -> None:
    warnings.warn(f"fastllm: {text}", RuntimeWarning, stacklevel=2)


def merge(path: Path, facts: Facts, new: Entries) -> bool:
    """Adds entries to a file, whoever else is writing it; False, with a warning, when it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(path.name + ".lock")):
            entries = read(path, facts)
            for name, found in new.items():
                entries.setdefault(name, {}).update(found)
            write(path, facts, entries)
    except OSError as error:
        _warn(f"what was tuned cannot be kept in {path}: {error}")
        return False
    return True


def write(path: Path, facts: Facts, entries: Entries) -> None:
    """The whole file: in a temporary one beside it first, so that nobody ever reads half."""
    ordered = {n: dict(sorted(of.items())) for n, of in sorted(entries.items())}
    data = {"format": FORMAT, "facts": facts, "entries": ordered}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the system drops the lock when its holder dies."""
    with open(path, "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
