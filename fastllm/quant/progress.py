"""A line on the terminal for what takes long."""

import sys
import time
from typing import Any, TextIO

PATIENCE = 2.0  # seconds before there is a line at all


class Progress:
    """`step(share, what)` draws a bar on stderr, where that is a terminal; `close()` wipes it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.begin = time.monotonic()
        self.bars: Any = None

    def step(self, share: float, what: str) -> None:
        """`share` of the work is done, `what` comes next."""
        patient = time.monotonic() - self.begin < PATIENCE
        if patient or not getattr(self.stream, "isatty", lambda: False)():
            return
        if self.bars is None:
            self.bars = _bars(self.stream)
            self.bars.start()
            self.bars.add_task(what, total=1.0)
        self.bars.update(self.bars.task_ids[0], completed=share, description=what, refresh=True)

    def close(self) -> None:
        """Leaves nothing behind."""
        if self.bars is not None:
            self.bars.stop()
            self.bars = None


def _bars(stream: TextIO) -> Any:
    from rich.console import Console  # most models never take long enough
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = BarColumn(), TextColumn("{task.description}", markup=False)
    return Bars(*columns, console=Console(file=stream), transient=True, auto_refresh=False)
