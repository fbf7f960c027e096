"""What quantizing a model did: one row for each linear layer, and the sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

COLUMNS = ("path", "from", "to", "before", "after", "SQNR dB", "why left")


@dataclass
class Row:
    """One layer. `sqnr` in dB: of its outputs on the calibration data, else of its weight."""

    path: str
    old: str
    new: str = ""
    before: int = 0
    after: int = 0
    sqnr: float | None = None
    reason: str = ""
    note: str = ""
    small: bool = False  # left for its size

    def cells(self) -> tuple[str, ...]:
        sqnr = "" if self.sqnr is None else f"{self.sqnr:.1f}"
        after = size(self.after) if self.new else ""
        path = self.path or "(the model)"
        why = self.reason or self.note
        return (path, self.old, self.new, size(self.before), after, sqnr, why)


@dataclass
class Report:
    """Rows in the model's order; bytes of the whole model; `str` is a plain table."""

    rows: list[Row] = field(default_factory=list)
    before: int = 0
    after: int = 0
    config: str = ""
    measured: str = "weights"
    notes: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> list[Row]:
        """Layers that have codes now."""
        return [row for row in self.rows if row.new]

    @property
    def left(self) -> list[Row]:
        """What was looked at and left alone: `reason` says why."""
        return [row for row in self.rows if row.reason]

    @property
    def worst(self) -> Row | None:
        """The quantized layer with the lowest SQNR."""
        known = [row for row in self.quantized if row.sqnr is not None]
        return min(known, key=lambda row: row.sqnr or 0.0, default=None)

    @property
    def summary(self) -> str:
        """One line."""
        done = len(self.quantized)
        line = f"quantized {done} layer{'' if done == 1 else 's'} ({self.config})"
        line += f", left {len(self.left)} alone; "
        line += f"{size(self.before)} -> {size(self.after)}"
        worst = self.worst
        if worst is not None:
            line += f"; lowest SQNR of {self.measured} {worst.sqnr:.1f} dB ({worst.path})"
        return line

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


def nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())


def size(count: int) -> str:
    """Bytes in words, in powers of 1000."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.1f} {unit}"
    return f"{count} B"
