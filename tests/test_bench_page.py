"""The bench's report as a page, in a browser where there is one; two runs compared."""

import html
import json
import shutil
import subprocess

import pytest

from fastllm.cli import main
from fastllm.cli.bench import charts, compare, page, report, results, rows
from fastllm.cli.bench.compare import _below

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = 390  # pixels wide


def made(op, family, side, dtype, direction, threads, compute=False, **changes):
    row = rows.Row(
        op, family, f"{side}x{side}-{dtype}", dtype, direction, threads, "cpu", 4 * side**2,
        (2 * side**3 if compute else 6 * side**2), side < 64,
    )  # fmt: skip
    ours = side**3 / 2e5 if compute else side**2 / 1e3
    row.rounds = 20
    row.microseconds = {"fastllm": ours, "eager": 2 * ours, "copy": 0.8 * ours}
    row.speedup = {"eager": [2.0, 1.9, 2.1], "copy": [0.8, 0.78, 0.82]}
    if direction != "backward":
        row.microseconds |= {"compiled": 0.9 * ours, "liger-kernel": 1.5 * ours}
        row.speedup |= {"compiled": [1.2 - side / 8192, 0.7, 1.3], "liger-kernel": [1.5] * 3}
    row.quartiles = {name: [0.97 * x, 1.03 * x] for name, x in row.microseconds.items()}
    row.limit_share, row.bound = min(0.2 + side / 5e3, 1.0), "compute" if compute else "memory"
    for name, value in changes.items():
        setattr(row, name, value)
    return row.json()


def a_run(**changes):
    found = [
        made(op, family, side, dtype, direction, threads, op == "linear")
        for op, family in (("rms_norm", "norm"), ("layer_norm", "norm"), ("linear", "matmul"))
        for side in (32, 512, 2048, 4096)
        for dtype in ("float32", "bfloat16")
        for threads in (4, 1)
        for direction in ("forward", "backward", "forward+backward")
    ]
    found.append(
        made("adamw<&>", "optim", 512, "float32", "step", 4, flops=0, wrong="off by a mile")
    )
    peaks = {"float32": 400.0, "bfloat16": 1200.0, "int8": 2000.0}
    limit = {"threads": 4, "copy_gb_s": 40.0, "read_gb_s": 44.0, "matmul_gflop_s": peaks}
    one = {"threads": 1, "copy_gb_s": 12.0, "read_gb_s": 13.0, "matmul_gflop_s": peaks}
    run = results.header("cpu") | {"complete": True, "planned": len(found), "seconds": 1.0}
    cost = {"op": "rms_norm", "case": "1x64", "no grad": 3.0}
    run |= {"limits": [limit, one], "rows": found, "overhead": [cost], "absent": {"torchao": "why"}}
    return json.loads(json.dumps(run | changes))


def test_page_has_its_charts_and_no_reference_to_a_network():
    text = page.html(a_run())
    for family in ("norm", "matmul", "optim"):
        assert f'id="{family}"'.replace('"', "'") in text
    assert text.count("class='chart") + text.count('class="chart') > 15
    for kind in ("bars", "roofline", "scaling"):
        assert f'class="chart {kind}"' in text
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text and "<link" not in text and "src=" not in text
    assert "adamw&lt;&amp;&gt;" in text and "adamw<" not in text
    assert "off by a mile" not in text or "wrong" in text


def test_losses_of_a_family_are_listed_and_none_is_said():
    run = a_run()
    text = page.html(run)
    norm = text[text.index("id='norm'") : text.index("id='matmul'")]
    lost = [r for r in report.losses(run["rows"]) if r["family"] == "norm"]
    assert lost
    assert norm.count("loses to compiled") >= len(lost)
    kept = [r for r in run["rows"] if not r["losses"] and not r["wrong"]]
    assert "Nothing is faster than ours" in page.html(run | {"rows": kept})


def test_page_of_an_unfinished_and_of_an_empty_run():
    run = a_run(complete=False, planned=500)
    assert "the run ended before all 500" in page.html(run)
    assert "Environment" in page.html(run | {"rows": [], "limits": [], "overhead": []})


def test_bars_are_as_long_as_the_ratios():
    row = made("rms_norm", "norm", 512, "float32", "forward", 4)
    drawn = dict(charts.candidates(row))
    assert drawn["fastllm"] == 2.0
    assert drawn["eager"] == 1.0
    assert drawn["liger-kernel"] == pytest.approx(2.0 / 1.5)
    text = charts.bars("x", [("a row", row)])
    widths = [float(part.split('"')[0]) for part in text.split(' width="')[1:]]
    assert widths[0] / widths[1] == pytest.approx(2.0, rel=0.01)


def test_no_bars_for_what_is_wrong_and_no_curve_for_one_size():
    wrong = made("rms_norm", "norm", 512, "float32", "forward", 4, wrong="no")
    assert "<rect" not in charts.bars("x", [("a row", wrong)])
    one = made("rms_norm", "norm", 512, "float32", "forward", 4)
    assert charts.scaling("x", [one, one]) == ""
    assert charts.roofline("x", [one | {"flops": 0}], a_run()["limits"][0]) == ""


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_page_in_a_browser_as_wide_as_a_phone(tmp_path):
    """In a frame of a phone's width, since a window has a least width of its own."""
    inner = page.html(a_run())
    (tmp_path / "page.html").write_text(
        f"<iframe width={PHONE} height=800 srcdoc='{html.escape(inner)}'></iframe><script>"
        "onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const of = (q) => [...d.querySelectorAll(q)];"
        "const boxes = of('svg.chart').map(x => x.getBoundingClientRect());"
        "const seen = boxes.filter(b => b.width > 200 && b.height > 25);"
        "const widest = Math.max(...boxes.map(b => b.right));"
        "document.title = [d.documentElement.scrollWidth, boxes.length, seen.length,"
        "Math.ceil(widest), of('rect.ours').length, of('circle.ours').length].join(' ') }"
        "</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = done.stdout.split("<title>")[1].split("</title>")[0]
    width, drawn, seen, widest, bars, dots = map(int, title.split())
    assert width <= PHONE
    assert widest <= PHONE
    assert drawn == seen == inner.count('class="chart ')
    assert bars > 10
    assert dots > 10


# ---- compare


def changed(run, op, factor, yardsticks=("eager", "copy"), spread=0.02):
    """`run` with an op's ratios moved by a factor and its quartiles at +-spread."""
    run = json.loads(json.dumps(run))
    for row in run["rows"]:
        for name in row["speedup"] if row["op"] == op else ():
            value = row["speedup"][name][0] * (factor if name in yardsticks else 1)
            row["speedup"][name] = [value, value * (1 - spread), value * (1 + spread)]
    return run


@pytest.fixture
def files(tmp_path):
    def write(*runs):
        paths = [tmp_path / f"{i}.json" for i, _ in enumerate(runs)]
        return [str(results.write(p, run)) for p, run in zip(paths, runs, strict=True)]

    return write


@pytest.mark.parametrize(
    ("factor", "spread", "yardsticks", "code"),
    [
        (0.7, 0.02, ("eager", "copy"), 1),
        (1.4, 0.02, ("eager", "copy"), 0),
        (0.99, 0.001, ("eager", "copy"), 0),  # a tie
        (0.8, 0.3, ("eager", "copy"), 0),  # noise
        (0.7, 0.02, ("eager",), 0),  # stock became faster: ours did not become slower
    ],
)
def test_compare_flags_what_is_beyond_the_noise(factor, spread, yardsticks, code, files, capsys):
    before = changed(a_run(), "rms_norm", 1.0, spread=spread)
    after = changed(before, "rms_norm", factor, yardsticks, spread)
    assert main(["bench", "--compare", *files(before, after)]) == code
    text = capsys.readouterr().out
    count = sum(row["op"] == "rms_norm" for row in before["rows"])
    assert (f"{count} slower" in text) == (code == 1)
    assert (f"{count} faster" in text) == (factor > 1)
    assert "layer_norm" not in text


def test_compare_shows_rows_of_one_run_only_and_newly_wrong_ones(files, capsys):
    before = a_run()
    after = json.loads(json.dumps(before))
    gone = before["rows"].pop(0)
    after["rows"].pop(1)
    after["rows"][5]["wrong"] = "off"
    assert main(["bench", "--compare", *files(before, after)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("only in") == 2
    assert f"1.json: {gone['op']} {gone['case']}" in text
    assert "broken: rms_norm" in text


def test_compare_refuses_other_devices_unless_forced(files, capsys):
    before, after = a_run(), a_run()
    after["device"] = after["device"] | {"cores": 128}
    paths = files(before, after)
    assert main(["bench", "--compare", *paths]) == 2
    error = capsys.readouterr().err
    assert "different devices" in error and "128" in error and "--force" in error
    assert main(["bench", "--compare", *paths, "--force"]) == 0


def test_compare_of_runs_without_a_row_in_common_is_an_error(files, capsys):
    before, after = a_run(), a_run()
    before["rows"], after["rows"] = before["rows"][:3], after["rows"][3:]
    assert main(["bench", "--compare", *files(before, after)]) == 2
    assert "no row in common" in capsys.readouterr().err


def test_noise_of_both_runs_counts():
    assert _below([1.0, 0.9, 1.1], [1.3, 1.2, 1.4])
    assert not _below([1.0, 0.9, 1.25], [1.3, 1.2, 1.4])
    assert not _below([1.0, 0.9, 1.1], [1.3, 1.05, 1.4])
    assert compare.compare(a_run(), a_run()).regressions == []
