"""The report's style sheet: light and dark, from a phone's width up."""

STYLE = """
:root {
  --page: #fbfbfa; --card: #fff; --text: #1c2024; --quiet: #60666d; --line: #e3e4e6;
  --ours: #0b73d0; --eager: #9aa2ab; --compiled: #e08a1e; --other: #8a63c9;
  --bad: #c62f2f; --good: #1f8a4c; color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --text: #e8eaed; --quiet: #9aa2ab; --line: #31363c;
    --ours: #4ea8f5; --eager: #737b85; --compiled: #f0a648; --other: #b394ec;
    --bad: #ff7b72; --good: #56c985;
  }
}
* { box-sizing: border-box; }
body, .chart { font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
body {
  margin: 0 auto; padding: 20px 16px 60px; max-width: 1180px; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); font-size: 15px; line-height: 1.5;
}
h1 { font-size: 26px; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 20px; margin: 44px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 22px 0 8px; }
p, ul { margin: 6px 0; }
.quiet, figcaption { color: var(--quiet); font-size: 13px; }
.tiles, .charts { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 18px 0; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; }
.tile span { color: var(--quiet); font-size: 13px; }
figure { margin: 0; padding: 10px 10px 8px; min-width: 0; }
figure b { display: block; margin: 0 0 2px 4px; font-size: 14px; }
figcaption { margin: 4px 4px 0; }
.chart { display: block; width: 100%; height: auto; font-size: 12px; }
.chart text { fill: var(--text); }
.chart .small, .chart .value { fill: var(--quiet); font-size: 11px; }
.chart .strong { fill: var(--text); font-weight: 700; }
.chart .bad { fill: var(--bad); }
.chart .end { text-anchor: end; }
.chart .middle { text-anchor: middle; }
.chart .grid { stroke: var(--line); }
.chart .limit, .chart .curve { fill: none; }
.chart .limit { stroke: var(--quiet); stroke-width: 1.3; stroke-dasharray: 4 3; }
.chart .curve { stroke-width: 2; }
.ours { fill: var(--ours); stroke: var(--ours); }
.eager { fill: var(--eager); stroke: var(--eager); }
.compiled { fill: var(--compiled); stroke: var(--compiled); }
.other { fill: var(--other); stroke: var(--other); }
rect, circle { stroke: none !important; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 6px 0 12px; font-size: 13px; }
.legend svg { width: 12px; height: 12px; vertical-align: -1px; margin-right: 5px; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--quiet); font-weight: 600; }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; }
.lost { color: var(--bad); font-weight: 600; }
.won { color: var(--good); }
summary { cursor: pointer; margin: 14px 0 6px; color: var(--quiet); }
"""
