"""`fastllm bench`: what it times, its budget, what it stores and how it goes on, its tables."""

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastllm import functional
from fastllm.cli import main
from fastllm.cli.app import CliError
from fastllm.cli.bench import ops, peers, readme, report, results, rows, session
from fastllm.cli.bench.budget import FIRST_COMPILE, Budget
from fastllm.cli.bench.ops import Inputs, as_tuple, bound, stock
from fastllm.cli.bench.plan import plan, thread_counts
from fastllm.core import subject
from fastllm.core.limits import Limits
from fastllm.core.measure import interleave
from fastllm.core.op import OPS
from fastllm.core.proof import Proof, relative_error
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


@pytest.mark.parametrize("change", [{"build": "another"}, {"complete": True}, {"schema": 1}])
def test_only_the_same_unfinished_run_is_gone_on_with(change, tmp_path):
    path = tmp_path / "run.json"
    run = stored([row()]) | {"complete": False}
    path.write_text(json.dumps(run))
    assert results.resumable(path, "cpu") == run
    path.write_text(json.dumps(run | change))
    assert results.resumable(path, "cpu") is None


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


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_compiled_candidate_agrees(direction, monkeypatch):
    backend = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: backend(f, backend="aot_eager", **k))
    inputs = Inputs(OPS["rms_norm"], TINY, "cpu", direction)
    got = inputs.compiled()()(0)
    want = inputs.candidate(stock(inputs.op))()(0)
    torch.testing.assert_close(got, want)


TIMED = [op for op in OPS.values() if ops.public(op) and any("bench" in c.tags for c in op.cases)]


@pytest.mark.parametrize("op", TIMED, ids=lambda op: op.name)
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_ours_and_stock_compute_the_same(op, direction, monkeypatch):
    if direction != "forward" and not op.gradients:
        pytest.skip("it has no gradients")
    monkeypatch.setattr(ops, "rotation", lambda *a: 2)  # nothing is timed
    timed = [c for c in op.cases if "bench" in c.tags]
    case = min(timed, key=lambda c: ops.cost(op, c).forward_bytes + ops.cost(op, c).forward_flops)
    inputs = Inputs(op, case, "cpu", direction)
    got, want = inputs.ours()(), inputs.candidate(stock(op))()
    found = interleave({"ours": lambda: got, "stock": lambda: want}, max_rounds=1, min_rounds=1)
    assert not found.failed
    for ours, theirs in zip(as_tuple(got(0)), as_tuple(want(0)), strict=True):
        assert relative_error(ours, theirs) < 2e-2


@pytest.mark.parametrize("op", TIMED, ids=lambda op: op.name)
def test_bound_is_the_public_function(op):
    quick = (c for c in op.cases if "quick" in c.tags and c.dtype == torch.float32)
    args = next(args for c in quick if sayable(op, args := c.args()))
    torch.testing.assert_close(bound(op, args)(), op(*args))


def sayable(op, args):
    """Whether the public function takes these tensors: a low-rank product is the op's own."""
    if op.call is not None:
        return True
    public = inspect.signature(getattr(functional, op.name)).parameters
    names = [part.split()[-1].split("=")[0] for part in op.schema.params.split(", ")]
    given = zip(names, args, strict=True)
    return all(name in public for name, value in given if isinstance(value, torch.Tensor))


def test_quick_takes_one_case_a_dtype():
    items = plan(quick=True)
    for op in TIMED:
        chosen = {x.scenario for x in items if x.subject.name == op.name}
        dtypes = [s.dtype for s in chosen]
        assert len(set(dtypes)) == len(dtypes)
        assert set(dtypes) == {c.dtype for c in op.cases if "bench" in c.tags}


def test_plan_has_every_row_once_and_the_quick_ones_first():
    quick, full = plan(quick=True, threads=[2]), plan(threads=[2, 1])
    assert [x.key for x in full[: len(quick)]] == [x.key for x in quick]
    assert len({x.key for x in full}) == len(full)
    for op in TIMED:
        named = {x.scenario.name for x in full if x.subject.name == op.name}
        assert named == {c.name for c in op.cases if "bench" in c.tags}
    assert {x.threads for x in full} == {1, 2}


def test_thread_counts():
    everything = torch.get_num_threads()
    assert thread_counts("cpu", None, False)[0] == everything
    assert thread_counts("cpu", None, False)[-1] == 1
    assert thread_counts("cpu", 3, False) == [3]
    assert thread_counts("cuda", None, False) == [None]


def test_peers_are_pinned_once_and_name_what_exists():
    pins = (ROOT / "pyproject.toml").read_text()
    for peer in peers.PEERS:
        assert f'"{peer.package}=={peer.version}"' in pins
        assert set(peer.functions) <= set(OPS)
    for peer in peers.PEERS:
        if importlib.util.find_spec(peer.module) and peer.package == "liger-kernel":
            assert all(callable(load()) for load in peer.functions.values())


def test_absent_peers_have_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "pip install liger-kernel==" in peers.absent("cuda")["liger-kernel"]
    for device in ("cpu", "cuda"):
        assert set(peers.absent(device)) == {peer.package for peer in peers.PEERS}
        assert peers.versions(device) == {}
    assert peers.installed("rms_norm", "cuda") == {}
    assert peers.installed("rms_norm", "cpu") == {}


def row(**changes):
    made = rows.Row(
        "rms_norm", "norm", "8x8-fp32", "float32", "forward", 1, "cpu", 1 << 21, 1 << 19, False
    )
    made.microseconds = {"fastllm": 10.0, "eager": 20.0, "compiled": 9.0, "copy": 8.0}
    made.speedup = {"eager": [2.0, 1.9, 2.1], "compiled": [0.9, 0.89, 0.91], "copy": [0.8] * 3}
    made.quartiles = {name: [0.97 * x, 1.03 * x] for name, x in made.microseconds.items()}
    made.limit_share, made.bound = 0.8, "memory"
    for name, value in changes.items():
        setattr(made, name, value)
    return made.json()


def test_losses_are_marked():
    lost = row()
    assert lost["losses"] == ["compiled"]  # the copy is a limit, not a rival
    assert row(speedup={"eager": [0.98, 0.9, 1.0], "copy": [0.5] * 3})["losses"] == []
    assert report.tally([lost, row(wrong="no")]).startswith("1 of 2 rows lose")
    page = report.markdown(stored([lost]))
    assert "**loses to compiled**" in page
    assert "0.90x" in page
    assert "2.00x (1.90-2.10)" in page


def stored(found):
    run = results.header("cpu") | {"complete": True, "planned": len(found), "seconds": 1.0}
    run |= {"limits": [], "rows": found, "overhead": [], "absent": {}}
    return json.loads(json.dumps(run))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda run: run.pop("limits"), "limits"),
        (lambda run: run.update(schema=99), "schema"),
        (lambda run: run["rows"][0].pop("speedup"), "speedup"),
        (lambda run: run["rows"][0].update(nbytes="many"), "nbytes"),
        (lambda run: run["rows"].append(None), "rows[1]"),
    ],
)
def test_stored_runs_are_checked(spoil, word, tmp_path):
    run = stored([row()])
    results.check(run, "here")
    spoil(run)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    with pytest.raises(CliError, match=word.replace("[", r"\[")):
        results.read(path)
    with pytest.raises(CliError):
        results.write(path, run)


def test_truncated_run_is_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"schema": 2, ')
    with pytest.raises(CliError, match=r"run\.json"):
        results.read(path)


def test_readme_table_is_generated(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    folder = tmp_path / "bench" / "results"
    small = row(case="tiny", nbytes=64, speedup={"eager": [3.0] * 3, "copy": [1.0] * 3})
    lost = row(case="slow", nbytes=32, direction="backward")
    big = row(case="big", nbytes=1 << 30, speedup={"eager": [3.0] * 3, "copy": [1.0] * 3})
    results.write(folder / "chip.json", stored([row(), small, lost, big]))
    assert main(["bench", "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert "| slow | backward | 1 | cpu | compiled (0.90x) |" in text
    assert "tiny" not in text
    assert "2 of 4 rows lose" in text
    assert readme.updated(page) == text


def test_readme_without_markers_is_refused(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text("nothing here\n")
    assert main(["bench", "--readme", str(page)]) == 2
    assert "bench: generated" in one_error(capsys)
    assert page.read_text() == "nothing here\n"


def test_readme_agrees_with_the_stored_runs():
    page = ROOT / "README.md"
    if not readme.run_files(page):
        pytest.skip("no results are stored")
    assert readme.updated(page) == page.read_text()


def test_pytest_bench_runs_what_the_registry_has():
    command = [sys.executable, "-m", "pytest", "bench", "-p", "no:cacheprovider"]
    command += ["--benchmark-disable", "-k", "rms_norm and 1x64-fp32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(".") >= 2 * 3 * 2, done.stdout  # ops, directions, backends
