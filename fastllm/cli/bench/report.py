"""A run for people: tables on the terminal, the same as Markdown."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastllm.cli.bench.ops import INTENSITY
from fastllm.cli.bench.rows import COMPILED, COPY, EAGER, OURS, TIE
from fastllm.cli.console import table

HEAD = ("case", "direction", "threads", "runs on", "µs", "vs eager", "vs compiled")
LEGEND = (
    "vs: how many times faster ours is, the median over interleaved rounds, with the quartiles "
    "where they are more than 5% apart. limit: the time that a plain copy of as many bytes into an "
    "existing tensor takes, or as many operations at the fastest rate of the run (marked c), over "
    "ours. peak: the share of the machine's arithmetic peak, measured beside ours on a CPU. warm: "
    "too small to be rotated past the cache. "
    f"**loses to**: that is faster than ours by more than {TIE:.0%}."
)


def row_head(peers: list[str]) -> list[str]:
    """What `row_cells` holds."""
    return [*HEAD, *(f"vs {p}" for p in peers), "limit", "peak", ""]


def terminal(op: str, rows: Iterable[dict[str, Any]]) -> Table:
    """One op's rows."""
    rows = list(rows)
    peers = peer_names(rows)
    columns = row_head(peers)
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
    parts += [LEGEND, "", *grid(*limits_table(run)), ""]
    parts += [f"{tally(run['rows'])}{unfinished(run)}.", ""]
    for op in dict.fromkeys(row["op"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["op"] == op]
        peers = peer_names(rows)
        head = row_head(peers)
        parts += [f"## {op}", "", *grid(head, (row_cells(r, peers) for r in rows)), ""]
    if run["overhead"]:
        parts += ["## What a call costs, µs", "", *grid(*overhead_rows(run["overhead"])), ""]
    parts += [f"- {name} is absent: {reason}" for name, reason in run["absent"].items()]
    return "\n".join(parts).rstrip() + "\n"


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]


def limits_table(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the machine reached at most in that run: head and rows."""
    dtypes = list(dict.fromkeys(name for x in run["limits"] for name in x["matmul_gflop_s"]))
    head = ["threads", "copy, GB/s", "read, GB/s", *(f"{d} product, GFLOP/s" for d in dtypes)]
    rows = [
        [
            str(x["threads"]),
            f"{x['copy_gb_s']:.1f}",
            f"{x['read_gb_s']:.1f}",
            *(f"{x['matmul_gflop_s'].get(d, 0):.0f}" for d in dtypes),
        ]
        for x in run["limits"]
    ]
    return head, rows


def overhead_rows(entries: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What a call costs on a tiny input: head and rows."""
    names = list(dict.fromkeys(n for e in entries for n in e if n not in ("op", "case")))
    rows = [
        [e["op"], e["case"], *(f"{e[n]:.1f}" if n in e else "-" for n in names)] for e in entries
    ]
    return ["op", "case", *names], rows


def overhead_table(entries: list[dict[str, Any]]) -> Table:
    """The same for the terminal."""
    head, rows = overhead_rows(entries)
    made = table("What a call costs, µs", *head, right=tuple(range(2, len(head))))
    for row in rows:
        made.add_row(*row)
    return made


def peer_names(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The peers that appear in any of the rows."""
    known = {OURS, EAGER, COMPILED, COPY}
    return sorted({name for row in rows for name in row["speedup"] if name not in known})


def representative(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """On the most threads, one case a dtype: the second largest, as in a quick run."""
    rows = list(rows)
    most = max(row["threads"] or 0 for row in rows)
    rows = [row for row in rows if (row["threads"] or 0) == most]
    chosen = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        sizes = {row["case"]: max(row["nbytes"], row["flops"] // INTENSITY) for row in own}
        case = sorted(sizes, key=lambda name: sizes[name])[-2:][0]
        chosen += [row for row in own if row["case"] == case]
    return chosen


def losses(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in which something beats ours, and rows that are wrong."""
    return [row for row in rows if row["losses"] or row["wrong"]]


def tally(rows: list[dict[str, Any]]) -> str:
    """How many rows lose, in a sentence."""
    wrong = sum(bool(row["wrong"]) for row in rows)
    text = f"{len(losses(rows)) - wrong} of {len(rows)} rows lose to something"
    return f"{text}; {wrong} are wrong and were not timed" if wrong else text


def unfinished(run: dict[str, Any]) -> str:
    """A note on a run that ended before all was measured."""
    return "" if run["complete"] else f"; the run ended before all {run['planned']} were measured"


def ratio(row: dict[str, Any], name: str) -> str:
    """`3.1x`, with the quartiles where they are far apart; a dash where there is none."""
    found = row["speedup"].get(name)
    if found is None:
        return "-"
    value, low, high = found
    spread = f" ({low:.2f}-{high:.2f})" if high - low > 0.05 * value else ""
    return f"{value:.2f}x{spread}"


def share(row: dict[str, Any]) -> str:
    """Of the limit, in percent; `c` where operations and not bytes are the limit."""
    if row["limit_share"] is None:
        return "-"
    return f"{row['limit_share']:.0%}" + " c" * (row["bound"] == "compute")


def print_limits(console: Console, entries: Iterable[dict[str, Any]]) -> None:
    """The limits of the machine, one line a thread count."""
    for x in entries:
        products = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in x["matmul_gflop_s"].items())
        console.print(
            f"limits on {x['threads']} thread(s): copy {x['copy_gb_s']:.1f} GB/s, read "
            f"{x['read_gb_s']:.1f} GB/s, matrix product in GFLOP/s: {products}"
        )


def print_wrong(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    """Why rows have no speedup, and why candidates are absent."""
    rows = list(rows)
    for reason in dict.fromkeys(row["wrong"] for row in rows if row["wrong"]):
        console.print(f"  no speedup: {reason}", style="bold red", markup=False)
    absent = {f"{n}: {why}" for row in rows for n, why in row["absent"].items()}
    for text in sorted(absent):
        console.print(f"  absent from some rows: {text}", style="dim", markup=False)


def print_end(console: Console, run: dict[str, Any]) -> None:
    """What belongs to the run as a whole."""
    if run["overhead"]:
        console.print(overhead_table(run["overhead"]))
    for name, reason in run["absent"].items():
        console.print(f"  {name} is absent: {reason}", style="dim", markup=False)
    console.print(tally(run["rows"]))


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
        "-" if row["peak_share"] is None else f"{row['peak_share']:.0%}",
    ]


def row_cells(row: dict[str, Any], peers: list[str]) -> list[str]:
    """A row as text; what is bad is marked `**so**`."""
    return [*_cells(row, peers), _mark(row)]


def _mark(row: dict[str, Any], bad: str = "**{}**", good: str = "{}") -> str:
    if row["wrong"]:
        return bad.format("wrong")
    if row["losses"]:
        return bad.format(f"loses to {', '.join(row['losses'])}")
    return good.format("")
