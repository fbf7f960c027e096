"""A line on the terminal for what takes long."""

import sys
import time
from typing import TextIO

PATIENCE = 2.0  # seconds before there is a line at all
_WIDTH = 24


class Progress:
    """`step(share, what)` draws a bar on stderr, where that is a terminal; `close()` wipes it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.begin = time.monotonic()
        self.drawn = 0

    def step(self, share: float, what: str) -> None:
        """`share` of the work is done, `what` comes next."""
        patient = time.monotonic() - self.begin < PATIENCE
        if patient or not getattr(self.stream, "isatty", lambda: False)():
            return
        full = round(_WIDTH * min(max(share, 0.0), 1.0))
        line = f"[{'#' * full}{'.' * (_WIDTH - full)}] {what}"[:100]
        self.stream.write("\r" + line.ljust(self.drawn))
        self.stream.flush()
        self.drawn = len(line)

    def close(self) -> None:
        """Leaves an empty line behind."""
        if self.drawn:
            self.stream.write("\r" + " " * self.drawn + "\r")
            self.stream.flush()
            self.drawn = 0
