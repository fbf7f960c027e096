"""What every command prints with: consoles, tables, progress; files that appear whole or not."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPED_WIDTH = 140  # nobody looks at a width of 80 in a file


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """rich would exit with 1; a reader that has seen enough (`| head`) is no error."""
        raise BrokenPipeError


def output() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def _console(stream: TextIO) -> Console:
    fixed = None if stream.isatty() or "COLUMNS" in os.environ else _PIPED_WIDTH
    return _Console(file=stream, width=fixed, highlight=False)


def table(title: str, *columns: str, right: tuple[int, ...] = ()) -> Table:
    """An empty table in the house style; columns at the places `right` are right-aligned."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if any(columns) else box.SIMPLE,
        show_header=any(columns),
    )
    for place, column in enumerate(columns):
        made.add_column(column, justify="right" if place in right else "left", overflow="fold")
    return made


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Progress bars on stderr, which vanish; none when stderr is not a terminal."""
    console = _console(sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield bars


def write_atomically(path: Path, data: str | bytes) -> Path:
    """Writes beside `path`, then renames: whoever looks finds the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
