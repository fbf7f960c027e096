"""A run as one HTML page: no script, no network, charts inline; readable on a phone."""

from collections.abc import Iterable
from html import escape
from statistics import median
from typing import Any

from fastllm.cli.bench import charts
from fastllm.cli.bench.report import (
    COMPILED,
    EAGER,
    LEGEND,
    limits_table,
    losses,
    overhead_rows,
    peer_names,
    representative,
    row_cells,
    row_head,
    unfinished,
)
from fastllm.cli.bench.rows import COPY, OURS
from fastllm.cli.bench.style import STYLE

Row = dict[str, Any]


def html(run: dict[str, Any]) -> str:
    """The page."""
    name = device_name(run)
    parts = [f"<h1>fastllm bench</h1><p>{escape(name)}</p>", _versions(run), *_tiles(run)]
    parts += [f"<p class='quiet'>{escape(LEGEND.replace('**', ''))}</p>"]
    parts += ["<h3>Limits measured in this run</h3>", _table(*limits_table(run))]
    for family in dict.fromkeys(row["family"] for row in run["rows"]):
        rows = [row for row in run["rows"] if row["family"] == family]
        parts += _family(family, rows, run["limits"])
    parts += _end(run)
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>fastllm bench: {escape(name)}</title><style>{STYLE}</style></head>"
        f"<body>\n{body}\n</body></html>\n"
    )


def device_name(run: dict[str, Any]) -> str:
    """What was measured on, for people."""
    device = run["device"]
    return device["gpu"] or f"{device['cpu']}, {device['cores']} cores, {device['isa']}"


def _versions(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if v)
    text = f"{run['date']}; {versions}; build {run['build']}"
    return f"<p class='quiet'>{escape(text + unfinished(run))}</p>"


def _tiles(run: dict[str, Any]) -> Iterable[str]:
    rows = [row for row in run["rows"] if not row["wrong"]]
    lost = losses(run["rows"])
    yield "<div class='tiles'>"
    yield _tile(str(len(run["rows"])), "rows measured")
    state = "lost" if lost else "won"
    yield _tile(str(len(lost)), "rows lost", state)
    for name in (EAGER, COMPILED):
        found = [row["speedup"][name][0] for row in rows if name in row["speedup"]]
        if found:
            yield _tile(f"{median(found):.2f}x", f"median speed over {name}")
    shares = [row["limit_share"] for row in rows if row["limit_share"]]
    if shares:
        yield _tile(f"{median(shares):.0%}", "median share of the limit")
    yield "</div>"


def _tile(value: str, label: str, kind: str = "") -> str:
    return f"<div class='tile'><b class='{kind}'>{value}</b><span>{label}</span></div>"


def _family(family: str, rows: list[Row], limits: list[dict[str, Any]]) -> Iterable[str]:
    yield f"<section id='{escape(family)}'><h2>{escape(family)}</h2>"
    yield _legend(rows)
    yield "<h3>How many times as fast as stock eager</h3><div class='charts'>"
    ops = list(dict.fromkeys(row["op"] for row in rows))
    for op in ops:
        shown = representative([row for row in rows if row["op"] == op])
        groups = [(f"{row['case']} · {row['direction']}", row) for row in shown]
        yield _figure(op, charts.bars(op, groups))
    yield "</div>"
    yield from _charts("Roofline", _rooflines(rows, limits))
    yield from _charts("Share of the limit, over size", _scalings(rows, ops))
    yield from _losses(rows)
    yield f"<details><summary>All {len(rows)} rows</summary>"
    yield _table(*_rows_table(rows))
    yield "</details></section>"


def _rooflines(rows: list[Row], limits: list[dict[str, Any]]) -> Iterable[str]:
    for entry in limits:
        fitting = [r for r in rows if r["threads"] in (entry["threads"], None)]
        made = charts.roofline("roofline", fitting, entry) if fitting else ""
        if made:
            note = "Dashed: the copy and the fastest dense product of this run."
            yield _figure(f"{entry['threads']} thread(s)", made, note)


def _scalings(rows: list[Row], ops: list[str]) -> Iterable[str]:
    most = max(row["threads"] or 0 for row in rows)
    for op in ops:
        own = [r for r in rows if r["op"] == op and (r["threads"] or 0) == most]
        for dtype in dict.fromkeys(r["dtype"] for r in own):
            direction = own[-1]["direction"]
            line = [r for r in own if r["dtype"] == dtype and r["direction"] == direction]
            made = charts.scaling(f"{op} {dtype}", line)
            if made:
                yield _figure(op, made, f"{dtype}, {direction}; across: bytes moved")


def _charts(title: str, figures: Iterable[str]) -> Iterable[str]:
    found = list(figures)
    if found:
        yield f"<h3>{title}</h3><div class='charts'>{''.join(found)}</div>"


def _figure(title: str, chart: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><b>{escape(title)}</b>{chart}{caption}</figure>"


def _legend(rows: list[Row]) -> str:
    names = {name for row in rows for name, _ in charts.candidates(row)}
    order = [n for n in (OURS, EAGER, COMPILED) if n in names]
    order += sorted(n for n in names if n not in order and n != COPY)
    chips = "".join(
        f"<span><svg viewBox='0 0 12 12'><rect class='{charts.colour(n)}' width='12' height='12' "
        f"rx='3'/></svg>{escape(n)}</span>"
        for n in order
    )
    return f"<div class='legend'>{chips}</div>"


def _losses(rows: list[Row]) -> Iterable[str]:
    lost = losses(rows)
    yield "<h3>Where we lose</h3>"
    if not lost:
        yield f"<p class='won'>Nothing is faster than ours in any of these {len(rows)} rows.</p>"
    else:
        yield _table(*_rows_table(lost))


def _rows_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    peers = peer_names(rows)
    several = len({row["op"] for row in rows}) > 1
    head = [*(["op"] if several else []), *row_head(peers)]
    return head, [[*([row["op"]] if several else []), *row_cells(row, peers)] for row in rows]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in rows)
    made = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{made}</div>"


def _cell(text: str) -> str:
    if text.startswith("**"):
        return f"<td class='lost'>{escape(text.strip('*'))}</td>"
    return f"<td>{escape(text)}</td>"


def _end(run: dict[str, Any]) -> Iterable[str]:
    if run["overhead"]:
        yield "<section><h2>What a call costs, µs</h2>"
        yield _table(*overhead_rows(run["overhead"]))
        yield "</section>"
    yield "<section><h2>Environment</h2>"
    device = run["device"] | {"load when it began": run["load"], "seconds": run["seconds"]}
    facts = [(k, str(v)) for k, v in (device | run["versions"]).items() if v is not None]
    yield _table(("", ""), facts)
    if run["absent"]:
        yield "<h3>Absent from the charts</h3><ul>"
        for name, reason in run["absent"].items():
            yield f"<li>{escape(name)}: {escape(reason)}</li>"
        yield "</ul>"
    yield "</section>"
