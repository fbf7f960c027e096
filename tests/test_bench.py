"""`fastllm bench`: a run, its budget, what it stores and how it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastllm.cli import main
from fastllm.cli.bench import ops, page, report, results, rows, session
from fastllm.cli.bench.budget import FIRST_COMPILE, Budget
from fastllm.core import subject
from fastllm.core.limits import Limits, arithmetic
from fastllm.core.op import OPS
from fastllm.core.proof import Proof
from fastllm.core.subject import Scenario, Subject, Trial

ROOT = Path(__file__).parent.parent
TINY = next(c for c in OPS["rms_norm"].cases if c.name == "1x64-fp32")


@pytest.fixture(autouse=True)
def few_threads():
    """More would only spin against each other where tests share the cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def quick_limits(monkeypatch):
    made = Limits(1e10, 1e10, {"float32": 1e11}, 1)
    monkeypatch.setattr(session, "measure_limits", lambda *a: made)
    monkeypatch.setattr(rows, "arithmetic", lambda *a: None)


def one_error(capsys):
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    return text


def test_bench_measures_writes_and_reads_back(quick_limits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal folds the headings
    argv = [
        "bench",
        "--op",
        "rms_norm",
        "--case",
        "1x64-fp32",
        "--budget",
        "30",
        "--threads",
        "1",
    ]
    argv += ["--device", "cpu", "--no-compile", "--json", str(tmp_path / "a.json")]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "vs eager" in text
    run = results.read(tmp_path / "a.json")
    assert [r["direction"] for r in run["rows"]] == ["forward", "backward", "forward+backward"]
    for row in run["rows"]:
        assert row["wrong"] is None
        assert row["warm"]
        assert row["threads"] == 1
        assert set(row["microseconds"]) == {"fastllm", "eager", "copy"}
        value, low, high = row["speedup"]["eager"]
        assert 0 < low <= value <= high
        assert row["limit_share"] > 0
    assert run["overhead"][0]["grad, eager"] > 0
    assert "cuda only" in run["absent"]["liger-kernel"]
    stored = sorted(p.suffix for p in (tmp_path / "out").iterdir())
    assert stored == [".html", ".json", ".md"]
    page = next((tmp_path / "out").glob("*.md")).read_text()
    assert "## rms_norm" in page
    assert "1x64-fp32 (warm)" in page


# ---- what is no op


def spinning(name, milliseconds, **more):
    """A subject whose calls only wait: ours less than stock."""

    def wait(seconds):
        def call(i):
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return lambda: call

    def trial(device, direction):
        slow, ours = milliseconds / 1e3, milliseconds / 2e3
        return Trial(wait(ours), {"eager": wait(slow), "fused": wait(slow)}, **more)

    dtype = torch.float32
    scenarios = [Scenario(f"{n}-fp32", dtype, n, trial) for n in (100, 200, 300)]
    return Subject(name, "waiting", scenarios)


@pytest.fixture
def waiting(monkeypatch, quick_limits):
    monkeypatch.setattr(subject, "SUBJECTS", {})
    return subject.register(spinning("wait", 0.5, nbytes=1 << 12, flops=1 << 24))


def test_registered_subject_gets_rows(waiting, tmp_path, capsys):
    path = tmp_path / "run.json"
    argv = ["bench", "waiting", "--budget", "9", "--threads", "1", "--device", "cpu"]
    assert main([*argv, "--json", str(path)]) == 0
    run = results.read(path)
    assert run["complete"]
    assert [(r["op"], r["case"]) for r in run["rows"]] == [
        ("wait", f"{n}-fp32") for n in (100, 200, 300)
    ]
    for row in run["rows"]:
        assert row["direction"] == "step"
        assert 1.6 < row["speedup"]["eager"][0] < 2.4
        assert 1.6 < row["speedup"]["fused"][0] < 2.4
        assert row["bound"] == "compute"
        least = row["flops"] / 1e11 * 1e6
        assert row["limit_share"] == pytest.approx(least / row["microseconds"]["fastllm"], rel=0.01)
        low, high = row["quartiles"]["eager"]
        assert low <= row["microseconds"]["eager"] <= high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_is_measured_beside_ours(quick_limits, dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "arithmetic", arithmetic)  # the fixture's does without
    monkeypatch.setattr(subject, "SUBJECTS", {})
    factory, operations = arithmetic(dtype, threads=1)
    made = Trial(factory, {"eager": factory}, nbytes=1 << 12, flops=operations)
    only = Scenario("bare", dtype, 100, lambda device, direction: made)
    subject.register(Subject("bare", "waiting", [only]))
    path = tmp_path / "run.json"
    argv = [
        "bench",
        "waiting",
        "--budget",
        "9",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--no-compile",
    ]
    assert main([*argv, "--json", str(path)]) == 0
    run = results.read(path)
    (row,) = run["rows"]
    assert row["peak_share"] == pytest.approx(1.0, rel=0.15)  # it is the peak itself
    assert set(row["microseconds"]) == {"fastllm", "eager", "copy"}
    text = f"{row['peak_share']:.0%}"
    head, cells = report.row_head([]), report.row_cells(row, [])
    assert cells[head.index("peak")] == text
    assert f"| {text} |" in report.markdown(run) and f"<td>{text}</td>" in page.html(run)
    del row["peak_share"]  # as files of before have it
    assert results.check(run, "here")["rows"][0]["peak_share"] is None


def test_subject_needs_a_free_name_and_scenarios(waiting):
    with pytest.raises(ValueError, match="wait"):
        subject.register(waiting)
    with pytest.raises(ValueError, match="scenarios"):
        subject.register(Subject("empty", "waiting", []))


def test_trial_that_cannot_be_made_is_a_wrong_row(waiting, tmp_path, monkeypatch, capsys):
    def trial(device, direction):
        raise MemoryError("no room for moments")

    broken = Subject("broken", "waiting", [Scenario("big", torch.float32, 1, trial)])
    subject.register(broken)
    path = tmp_path / "run.json"
    argv = ["bench", "waiting", "--op", "broken", "--device", "cpu", "--json", str(path)]
    assert main(argv) == 1
    assert "no room for moments" in results.read(path)["rows"][0]["wrong"]
    assert "no room for moments" in capsys.readouterr().out


# ---- budget, interrupts, going on


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_budget_is_divided_over_the_rows():
    clock = Clock()
    budget = Budget(100.0, [0] * 100, 1.0, clock)
    shares = []
    while budget.ranks and budget.enough():
        timing = budget.timing()
        shares.append(timing)
        clock.now += 0.3 + timing
        budget.spent(0.3 + timing, timing, compiled=False)
    assert len(shares) == 100
    assert clock.now == pytest.approx(100, abs=1)
    assert max(shares) <= 1.0


def test_budget_ends_before_it_is_overdrawn():
    clock = Clock()
    budget = Budget(10.0, [0] * 100, 1.0, clock)
    while budget.ranks and budget.enough():
        timing = budget.timing()
        clock.now += 0.9 + timing
        budget.spent(0.9 + timing, timing, compiled=False)
    assert 8 < clock.now <= 10.5
    assert len(budget.ranks) > 80


@pytest.mark.parametrize(("seconds", "least", "most"), [(30, 0, 0), (90, 8, 16), (1000, 40, 40)])
def test_compiling_fits_into_what_is_left_main_rows_first(seconds, least, most):
    clock = Clock()
    ranks = [1, 1, 1, 0] * 10
    budget = Budget(float(seconds), list(ranks), 0.25, clock)
    compiled = []
    for rank in ranks:
        yes, timing = budget.compiles(), budget.timing()
        price = (FIRST_COMPILE + 3 if not compiled else 3.0) if yes else 0.0
        compiled += [rank] if yes else []
        clock.now += 0.4 + timing + price
        budget.spent(0.4 + timing + price, timing, yes)
    assert least <= len(compiled) <= most
    assert compiled.count(0) == min(10, len(compiled)) or compiled.count(0) >= 8
    assert clock.now <= seconds + 3


def interrupting(monkeypatch, after, error=KeyboardInterrupt):
    real, count = session.measure, [0]

    def measure(*args):
        count[0] += 1
        if count[0] > after:
            raise error
        return real(*args)

    monkeypatch.setattr(session, "measure", measure)
    return count


def test_interrupt_leaves_what_was_done_and_a_rerun_goes_on(waiting, monkeypatch, tmp_path, capsys):
    argv = ["bench", "waiting", "--budget", "9", "--threads", "1", "--device", "cpu"]
    argv += ["--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        assert main(argv) == 130
    path = next(tmp_path.glob("*.json"))
    first = results.read(path)
    assert (first["complete"], len(first["rows"])) == (False, 2)
    assert "the run ended before all 3" in next(tmp_path.glob("*.md")).read_text()
    assert "goes on from there" in capsys.readouterr().out
    count = interrupting(monkeypatch, 99)
    assert main(argv) == 0
    second = results.read(path)
    assert count == [1]
    assert second["complete"]
    assert all(row in second["rows"] for row in first["rows"])
    assert main(argv) == 0  # complete: begins anew
    assert count == [4]


def test_budget_that_is_spent_is_said_and_is_no_failure(waiting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Budget, "enough", lambda self: len(self.ranks) > 1)
    path = tmp_path / "run.json"
    argv = ["bench", "waiting", "--threads", "1", "--device", "cpu", "--json", str(path)]
    assert main(argv) == 0
    run = results.read(path)
    assert (run["complete"], len(run["rows"]), run["planned"]) == (False, 2, 3)
    assert "2 of 3 rows" in capsys.readouterr().out


def test_termination_leaves_a_valid_file(tmp_path):
    path = tmp_path / "run.json"
    argv = [sys.executable, "-m", "fastllm", "bench", "--op", "rms_norm", "--no-compile"]
    argv += ["--device", "cpu", "--threads", "1", "--budget", "300", "--json", str(path)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    run = results.read(path)
    assert run["rows"]
    assert not run["complete"]


# ---- what is wrong, and what a call is


def test_no_speedup_for_what_is_wrong(quick_limits, monkeypatch, tmp_path, capsys):
    failing = Proof(False, 1.0, 0.1, "rms_norm off by a mile")
    monkeypatch.setattr(ops, "prove", lambda *a: failing)
    argv = ["bench", "--op", "rms_norm", "--case", "1x64-fp32", "--budget", "5", "--no-compile"]
    assert main([*argv, "--device", "cpu", "--json", str(tmp_path / "a.json")]) == 1
    assert "off by a mile" in capsys.readouterr().out
    for row in results.read(tmp_path / "a.json")["rows"]:
        assert row["wrong"] == "rms_norm off by a mile"
        assert not row["speedup"]
        assert not row["microseconds"]


def test_pytest_bench_runs_what_the_registry_has():
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider"]
    command += ["--benchmark-disable", "-k", "rms_norm and 1x64-fp32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(".") >= 2 * 3 * 2, done.stdout  # ops, directions, backends
