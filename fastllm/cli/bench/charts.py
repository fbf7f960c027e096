"""The report's charts as small SVG: bars, a roofline, shares of the limit over size.

Colours are classes that the page styles, so that a chart is readable in the dark, too. Each is
drawn 360 wide and scaled by the page.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from fastllm.cli.bench.rows import COMPILED, COPY, EAGER, OURS

WIDTH = 360
_TEXT, _BAR, _GAP = 15, 13, 10  # heights
_LEFT, _RIGHT = 4, 42
_BASE = (OURS, EAGER, COMPILED)

Row = dict[str, Any]


def colour(name: str) -> str:
    """The class that a candidate is drawn in."""
    known = {OURS: "ours", EAGER: "eager", COMPILED: "compiled"}
    return known.get(name, "other")


def candidates(row: Row) -> list[tuple[str, float]]:
    """What was timed, and how many times faster than stock eager it is."""
    over = row["speedup"].get(EAGER)
    if over is None or row["wrong"]:
        return []
    found = {OURS: over[0], EAGER: 1.0}
    for name, x in row["speedup"].items():
        if name not in (EAGER, COPY):
            found[name] = over[0] / x[0]
    order = [n for n in _BASE if n in found] + sorted(n for n in found if n not in _BASE)
    return [(name, found[name]) for name in order]


def bars(title: str, groups: Sequence[tuple[str, Row]]) -> str:
    """Speed relative to stock eager, longer is faster: a group of bars a row, labelled."""
    drawn = [(label, row, candidates(row)) for label, row in groups]
    top = max([1.0, *(x for _, _, found in drawn for _, x in found)])
    scale = (WIDTH - _LEFT - _RIGHT) / top
    y, parts = 4.0, []
    for label, row, found in drawn:
        y += _TEXT
        parts.append(_text(_LEFT, y - 3, label, "label"))
        if not found:
            why = "wrong: no speedup" if row["wrong"] else "not timed"
            parts.append(_text(_LEFT, y + _BAR - 1, why, "bad" if row["wrong"] else "small"))
            y += _BAR
        for name, x in found:
            tip = f"{name}: {x:.2f} times as fast as eager, {row['microseconds'][name]:g} µs"
            parts.append(_rect(_LEFT, y, max(x * scale, 1), _BAR - 2, colour(name), tip))
            bold = "value"
            if name == OURS:
                bold = "value bad strong" if row["losses"] else "value strong"
            parts.append(_text(_LEFT + x * scale + 4, y + _BAR - 3, _times(x), bold))
            y += _BAR
        y += _GAP
    one = _LEFT + scale
    parts.insert(
        0, f'<line class="grid" x1="{one:.1f}" x2="{one:.1f}" y1="4" y2="{y - _GAP:.0f}"/>'
    )
    return _svg("bars", title, y, parts)


def roofline(title: str, rows: Iterable[Row], limits: dict[str, Any]) -> str:
    """Operations a second over operations a byte, below what the machine can do; "" if no flops."""
    rows = [r for r in rows if r["flops"] and r["nbytes"] and OURS in r["microseconds"]]
    if not rows:
        return ""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    peaks = {d: _peak(limits, d) for d in dtypes}
    peaks = {d: x for d, x in peaks.items() if x}
    copy = limits["copy_gb_s"]
    points = [(r, r["flops"] / r["nbytes"]) for r in rows]
    rates = [_rate(r, OURS) for r in rows]
    eager = [_rate(r, EAGER) for r in rows if EAGER in r["microseconds"]]
    ridge = max(peaks.values(), default=copy) / copy
    xs = _Log(min(x for _, x in points) / 2, max(ridge * 2, *(x for _, x in points)), 40, 348)
    ys = _Log(min(*rates, *eager) / 1.5, 1.6 * max([*peaks.values(), *rates]), 236, 10)
    parts = [*_log_axis(xs, ys, "operations per byte", "GFLOP/s")]
    for dtype, peak in peaks.items():
        knee = max(peak / copy, xs.low)
        parts.append(_path([(xs(knee), ys(peak)), (xs(xs.high), ys(peak))], "limit"))
        close = any(0 < ys(peak) - ys(other) < 14 for other in peaks.values())
        parts.append(
            _text(346, ys(peak) + (11 if close else -3), f"{dtype} {peak:.0f}", "small end")
        )
    highest = max(peaks.values(), default=copy * xs.high)
    ends = (max(xs.low, ys.low / copy), min(xs.high, highest / copy))
    parts.append(_path([(xs(x), ys(x * copy)) for x in ends], "limit"))
    middle = math.sqrt(ends[0] * ends[1])
    parts.append(_text(xs(middle) - 6, ys(middle * copy), f"copy {copy:.0f} GB/s", "small end"))
    for row, x in points:
        if EAGER in row["microseconds"]:
            parts.append(_dot(xs(x), ys(_rate(row, EAGER)), "eager", f"eager: {_name(row)}", 3))
    for (row, x), rate in zip(points, rates, strict=True):
        tip = f"{_name(row)}: {rate:.4g} GFLOP/s, {_percent(row['limit_share'])} of its limit"
        parts.append(_dot(xs(x), ys(rate), "ours", tip))
    return _svg("roofline", title, 268, parts)


def scaling(title: str, rows: Iterable[Row]) -> str:
    """Shares of the limit over bytes moved, a line a candidate; "" when there is one size only."""
    rows = sorted((r for r in rows if r["limit_share"] and not r["wrong"]), key=_nbytes)
    if len({_nbytes(r) for r in rows}) < 2:
        return ""
    lines: dict[str, list[tuple[Row, float]]] = {}
    for row in rows:
        share = row["limit_share"]
        lines.setdefault(OURS, []).append((row, share))
        for name, x in row["speedup"].items():
            if name != COPY:
                lines.setdefault(name, []).append((row, share / x[0]))
    top = max(1.1, *(1.05 * y for line in lines.values() for _, y in line))
    xs = _Log(_nbytes(rows[0]) / 1.5, _nbytes(rows[-1]) * 1.5, 40, 348)
    ys = _Linear(0.0, top, 156, 8)
    parts = []
    for step in range(0, math.floor(top * 2) + 1):
        parts += _level(ys(step / 2), f"{step * 50}%")
    parts.append(_path([(40, ys(1.0)), (348, ys(1.0))], "limit"))
    for power in range(math.ceil(math.log2(xs.low)), math.floor(math.log2(xs.high)) + 1):
        if power % 5 == 0:
            x = min(xs(2.0**power), 332)
            parts.append(_text(x, 170, _size(2**power), "small middle"))
    for name in sorted(lines, key=lambda n: n == OURS):
        drawn = [(xs(_nbytes(r)), ys(y)) for r, y in lines[name]]
        parts.append(_path(drawn, f"curve {colour(name)}"))
        for (row, y), (px, py) in zip(lines[name], drawn, strict=True):
            tip = f"{name}: {_percent(y)} of the limit, {_name(row)}"
            parts.append(_dot(px, py, colour(name), tip, 2.5))
    return _svg("scaling", title, 176, parts)


class _Log:
    """A logarithmic scale from [low, high] to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + part * (self.end - self.start)


class _Linear(_Log):
    """A linear one."""

    def __call__(self, value: float) -> float:
        part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)


def _log_axis(xs: _Log, ys: _Log, across: str, up: str) -> Iterable[str]:
    for power in range(math.ceil(math.log10(ys.low)), math.floor(math.log10(ys.high)) + 1):
        yield from _level(ys(10.0**power), f"{10.0**power:g}")
    for power in range(math.ceil(math.log10(xs.low)), math.floor(math.log10(xs.high)) + 1):
        x = xs(10.0**power)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="10" y2="236"/>'
        yield _text(x, 249, f"{10.0**power:g}", "small middle")
    yield _text(194, 263, across, "small middle")
    yield _text(44, 20, up, "small")


def _level(y: float, label: str) -> list[str]:
    line = f'<line class="grid" x1="40" x2="348" y1="{y:.1f}" y2="{y:.1f}"/>'
    return [line, _text(36, y + 3.5, label, "small end")]


def _svg(kind: str, title: str, height: float, parts: Iterable[str]) -> str:
    head = f'<svg class="chart {kind}" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    return f'{head} aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _rect(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    size = f'x="{x}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="2"'
    return f'<rect class="{kind}" {size}><title>{escape(tip)}</title></rect>'


def _dot(x: float, y: float, kind: str, tip: str, radius: float = 3.5) -> str:
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{kind}" {place}><title>{escape(tip)}</title></circle>'


def _path(points: Iterable[tuple[float, float]], kind: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{places}"/>'


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _peak(limits: dict[str, Any], dtype: str) -> float:
    found = limits["matmul_gflop_s"]
    return max(found.get(dtype, 0.0), found.get("float32", 0.0))


def _nbytes(row: Row) -> int:
    return max(row["nbytes"], 1)


def _rate(row: Row, name: str) -> float:
    """GFLOP/s."""
    return row["flops"] / row["microseconds"][name] / 1e3


def _name(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['direction']}"


def _times(x: float) -> str:
    return f"{x:.2f}x" if x < 10 else f"{x:.1f}x" if x < 100 else f"{x:.0f}x"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _size(nbytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes} {unit}"
        nbytes //= 1024
    return f"{nbytes} GiB"
