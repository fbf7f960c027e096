"""What a swap did: one row for each module it changed or looked at and left alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("path", "from", "to", "backend", "error", "speed", "why left")
MODULES = ("norm", "linear", "embedding", "activation", "attention")
BLOCKS = (
    "residual addition",
    "MLP",
    "mixture of experts",
    "rotary embedding",
    "attention function",
    "loss",
    "padding",
)


@dataclass
class Row:
    """One module. `error` against float64 and its `budget`; `reason` is set where it was left.

    kind   one of MODULES: the module itself runs fastllm's code; or of BLOCKS: its forward has
           something fused
    also   the kinds of what else the same change fuses
    ratio  how many times as fast as the original, where it was tuned
    """

    path: str
    old: str
    new: str = ""
    backend: str = ""
    error: float | None = None
    budget: float | None = None
    reason: str = ""
    kind: str = ""
    adds: int = 0
    also: tuple[str, ...] = ()
    ratio: float | None = None

    def cells(self) -> tuple[str, ...]:
        error = "" if self.error is None else f"{self.error:.1e}"
        if self.error is not None and self.budget is not None:
            error += f" of {self.budget:.1e}"
        speed = "" if self.ratio is None else f"{self.ratio:.2f}x"
        path = self.path or "(the model)"
        return (path, self.old, self.new, self.backend, error, speed, self.reason)


@dataclass
class Report:
    """Rows in the model's order, and notes about the whole. `str` is a plain table.

    `ratio`: how many times as fast as the original the whole model is, where it was tuned.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ratio: float | None = None

    @property
    def swapped(self) -> list[Row]:
        """Modules that run fastllm's code now."""
        return [row for row in self.rows if row.kind in MODULES and row.new and not row.reason]

    @property
    def fused(self) -> list[Row]:
        """Blocks with something fused in their forward."""
        return [row for row in self.rows if row.kind in BLOCKS and row.new and not row.reason]

    def count(self, kind: str) -> int:
        """How many of one kind are swapped or fused."""
        done = (*self.swapped, *self.fused)
        rows = [row for row in done if kind == row.kind or kind in row.also]
        return sum(row.adds or 1 for row in rows)

    @property
    def adds(self) -> int:
        """How many additions are fused."""
        return self.count("residual addition")

    @property
    def left(self) -> list[Row]:
        """What was looked at and left alone, or put back: `reason` says why."""
        return [row for row in self.rows if row.reason]

    @property
    def summary(self) -> str:
        """One line."""
        parts = []
        for verb, kinds in (("swapped", MODULES), ("fused", BLOCKS)):
            counts = [(self.count(kind), kind) for kind in kinds]
            named = [_count(n, kind) for n, kind in counts if n]
            parts.append(f"{verb} {', '.join(named) or 'nothing'}")
        return "; ".join([*parts, f"left {len(self.left)} alone"])

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [self.summary, *self.notes]
        if self.rows:
            cells = [COLUMNS, *(row.cells() for row in self.rows)]
            used = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells[1:])]
            widths = {i: max(len(row[i]) for row in cells) for i in used}
            lines += ["", *("  ".join(r[i].ljust(widths[i]) for i in used).rstrip() for r in cells)]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table(*COLUMNS, title="\n".join([self.summary, *self.notes]))
        for row in self.rows:
            table.add_row(*row.cells())
        return table


def _count(number: int, noun: str) -> str:
    first, *rest = noun.split(" of ")
    return " of ".join([f"{number} {first}" + ("" if number == 1 else "s"), *rest])
