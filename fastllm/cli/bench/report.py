"""A run for people: tables on the terminal, the same as Markdown."""

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastllm.cli.bench.rows import COMPILED, COPY, EAGER, OURS, TIE
from fastllm.cli.console import table

_HEAD = ("case", "direction", "threads", "runs on", "µs", "vs eager", "vs compiled")
_LEGEND = (
    "vs: how many times faster ours is, the median over interleaved rounds, with the quartiles "
    "where they are more than 5% apart. limit: share of the speed of a plain copy of as many bytes "
    "into an existing tensor, in the same run. warm: too small to be rotated past the cache. "
    f"**loses to**: that is faster than ours by more than {TIE:.0%}."
)


def terminal(op: str, rows: Iterable[dict[str, Any]]) -> Table:
    """One op's rows."""
    rows = list(rows)
    peers = peer_names(rows)
    columns = (*_HEAD, *(f"vs {p}" for p in peers), "limit", "")
    made = table(op, *columns, right=tuple(range(4, len(columns) - 1)))
    last = None
    for row in rows:
        if last not in (None, row["case"]):
            made.add_section()
        cells = [escape(c) for c in _cells(row, peers)]
        if row["case"] == last:
            cells[0] = ""
        made.add_row(*cells, _mark(row, "[bold red]{}[/]", "[green]{}[/]"))
        last = row["case"]
    return made


def markdown(run: dict[str, Any]) -> str:
    """The whole run as a page."""
    device, versions = run["device"], run["versions"]
    name = device["gpu"] or f"{device['cpu']}, {device['cores']} cores, {device['isa']}"
    parts = [f"# Bench: {name}", ""]
    parts += [
        f"{run['date']}; " + ", ".join(f"{k} {v}" for k, v in versions.items() if v) + ".",
        "",
    ]
    parts += [_LEGEND, "", *limits(run), ""]
    parts += [f"{tally(run['rows'])}.", ""]
    for op in dict.fromkeys(row["op"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["op"] == op]
        peers = peer_names(rows)
        head = (*_HEAD, *(f"vs {p}" for p in peers), "limit", "")
        parts += [f"## {op}", "", *grid(head, ([*_cells(r, peers), _mark(r)] for r in rows)), ""]
    parts += [*overhead(run["overhead"]), ""]
    parts += [f"- {name} is absent: {reason}" for name, reason in run["absent"].items()]
    return "\n".join(parts).rstrip() + "\n"


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]


def limits(run: dict[str, Any]) -> list[str]:
    """What the machine reached at most in that run."""
    head = ("threads", "copy, GB/s", "read, GB/s", "matrix product, GFLOP/s")
    rows = [
        (
            str(x["threads"]),
            f"{x['copy_gb_s']:.1f}",
            f"{x['read_gb_s']:.1f}",
            ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in x["matmul_gflop_s"].items()),
        )
        for x in run["limits"]
    ]
    return grid(head, rows) if rows else []


def overhead(entries: list[dict[str, Any]]) -> list[str]:
    """What a call costs on a tiny input."""
    if not entries:
        return []
    names = [n for n in entries[0] if n not in ("op", "case")]
    rows = [
        [e["op"], e["case"], *(f"{e[n]:.1f}" if n in e else "-" for n in names)] for e in entries
    ]
    return ["## What a call costs, µs", "", *grid(("op", "case", *names), rows)]


def overhead_table(entries: list[dict[str, Any]]) -> Table:
    """The same for the terminal."""
    names = [n for n in entries[0] if n not in ("op", "case")]
    columns = ("op", "case", *names)
    made = table("What a call costs, µs", *columns, right=tuple(range(2, len(columns))))
    for e in entries:
        made.add_row(e["op"], e["case"], *(f"{e[n]:.1f}" if n in e else "-" for n in names))
    return made


def peer_names(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The peers that appear in any of the rows."""
    known = {OURS, EAGER, COMPILED, COPY}
    return sorted({name for row in rows for name in row["speedup"] if name not in known})


def losses(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which something beats ours, and rows that are wrong."""
    return [row for row in rows if row["losses"] or row["wrong"]]


def tally(rows: list[dict[str, Any]]) -> str:
    """How many rows lose, in a sentence."""
    wrong = sum(bool(row["wrong"]) for row in rows)
    text = f"{len(losses(rows)) - wrong} of {len(rows)} rows lose to something"
    return f"{text}; {wrong} are wrong and were not timed" if wrong else text


def ratio(row: dict[str, Any], name: str) -> str:
    """`3.1x`, with the quartiles where they are far apart; a dash where there is none."""
    found = row["speedup"].get(name)
    if found is None:
        return "-"
    value, low, high = found
    spread = f" ({low:.2f}-{high:.2f})" if high - low > 0.05 * value else ""
    return f"{value:.2f}x{spread}"


def share(row: dict[str, Any]) -> str:
    """Of the limit, in percent."""
    return "-" if row["limit_share"] is None else f"{row['limit_share']:.0%}"


def _cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    ours = row["microseconds"].get(OURS)
    return [
        row["case"] + (" (warm)" if row["warm"] else ""),
        row["direction"],
        str(row["threads"] or "-"),
        row["backend"],
        "-" if ours is None else f"{ours:.1f}" if ours < 100 else f"{ours:.0f}",
        ratio(row, EAGER),
        ratio(row, COMPILED),
        *(ratio(row, p) for p in peers),
        share(row),
    ]


def _mark(row: dict[str, Any], bad: str = "**{}**", good: str = "{}") -> str:
    if row["wrong"]:
        return bad.format("wrong")
    if row["losses"]:
        return bad.format(f"loses to {', '.join(row['losses'])}")
    return good.format("")
