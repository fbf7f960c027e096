"""The command line: help, info, check, bench, and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.cli import bench, console, main
from fastllm.cli.app import CliError
from fastllm.cli.bench import peers, readme, report, results, rows
from fastllm.cli.bench.subject import Subject, bound, stock
from fastllm.core.backend import Backend
from fastllm.core.limits import Limits
from fastllm.core.measure import interleave
from fastllm.core.op import OPS
from fastllm.core.proof import Proof

ROOT = Path(__file__).parent.parent
TINY = next(c for c in OPS["rms_norm"].cases if c.name == "1x64-fp32")


@pytest.fixture(autouse=True)
def few_threads():
    """More would only spin against each other where tests share the cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def quick_limits(monkeypatch):
    made = Limits(1e10, 1e10, {"float32": 1e11}, 1)
    monkeypatch.setattr(bench, "measure_limits", lambda *a: made)


@pytest.fixture
def broken_backend(monkeypatch):
    """A `triton` backend of rms_norm that is wrong by a little."""

    def forward(*args):
        return stock(OPS["rms_norm"])(*args) * 1.001

    wrong = Backend("triton", forward)
    monkeypatch.setitem(OPS["rms_norm"].backends, "triton", wrong)


def one_error(capsys):
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    assert "Traceback" not in text
    return text


# ---- the entry


@pytest.mark.parametrize("command", ["", "info", "check", "bench", "demo"])
def test_help(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: fastllm {command}".strip() in text
    assert "options:" in text


def test_python_m_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "fastllm", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert done.stdout.startswith("fastllm ")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "COMMAND"),
        (["frobnicate"], "frobnicate"),
        (["check", "--threads", "0"], "'0'"),
        (["check", "--threads", "two"], "'two'"),
        (["check", "no_such_op"], "no_such_op"),
        (["check", "--backend", "no_such"], "no_such"),
        (["check", "--backend", "torch"], "yardstick"),
        (["bench", "no_such_family"], "no_such_family"),
        (["bench", "--op", "no_such"], "no_such"),
        (["bench", "--dtype", "int3"], "int3"),
        (["bench", "--dtype", "nn"], "'nn'"),
        (["bench", "--device", "tpu9"], "tpu9"),
        (["bench", "--case", "no such case"], "--case"),
        (["bench", "--budget", "-1"], "'-1'"),
        (["bench", "--readme", "/no/such/README.md"], "/no/such/README.md"),
        (["demo", "--seconds", "nan"], "'nan'"),
        (["info", "extra"], "extra"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(argv, word, capsys):
    assert main(argv) == 2
    assert word in one_error(capsys)


def test_interrupt_is_one_line_and_130(monkeypatch, capsys):
    from fastllm.cli import info

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert "interrupted" in one_error(capsys)


def test_unexpected_error_is_one_line_unless_asked_for(monkeypatch, capsys):
    from fastllm.cli import info

    def fails(args):
        raise RuntimeError("several\nlines")

    monkeypatch.setattr(info, "run", fails)
    assert main(["info"]) == 2
    assert "several lines (RuntimeError" in one_error(capsys)
    monkeypatch.setenv("FASTLLM_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="several"):
        main(["info"])


def test_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m fastllm info | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    console.write_atomically(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        console.write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


# ---- info and check


def test_info_names_ops_backends_and_environment(capsys, monkeypatch):
    monkeypatch.setenv("FASTLLM_POOL_BYTES", "12345")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in (*OPS, "torch", "reference", "FASTLLM_POOL_BYTES", "12345", "instruction set"):
        assert name in text
    missing = {b.missing for op in OPS.values() for b in op.backends.values() if b.missing}
    flat = " ".join(text.split())
    assert all(" ".join(reason.split()) in flat for reason in missing)


def test_check_proves_an_op_on_every_backend_here(capsys):
    threads = torch.get_num_threads()
    assert main(["check", "add_rms_norm", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "keep the error budget" in text
    assert torch.get_num_threads() == threads
    for name, backend in OPS["add_rms_norm"].backends.items():
        if name != "torch":
            assert (backend.missing or name) in " ".join(text.split())


def test_check_finds_a_wrong_backend(broken_backend, capsys):
    assert main(["check", "rms_norm", "--backend", "triton"]) == 1
    text = capsys.readouterr().out
    assert "exceed the error budget" in text
    assert "failed on triton: rms_norm" in text


def test_check_counts_a_crash_as_a_failure(monkeypatch, capsys):
    def forward(*args):
        raise RuntimeError("kernel fell over")

    monkeypatch.setitem(OPS["rms_norm"].backends, "triton", Backend("triton", forward))
    assert main(["check", "rms_norm", "--backend", "triton"]) == 1
    assert "kernel fell over" in capsys.readouterr().out


def test_check_that_checks_nothing_is_an_error(monkeypatch, capsys):
    absent = Backend("triton", stock(OPS["rms_norm"]), available=lambda: "no such chip")
    monkeypatch.setitem(OPS["rms_norm"].backends, "triton", absent)
    assert main(["check", "rms_norm", "--backend", "triton"]) == 2
    assert "nothing could be checked" in one_error(capsys)


# ---- bench


def test_bench_measures_writes_and_reads_back(quick_limits, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal folds the headings
    argv = [
        "bench",
        "--op",
        "rms_norm",
        "--case",
        "1x64-fp32",
        "--budget",
        "0.02",
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
    assert run["absent"] == {"liger-kernel": "runs on cuda only"}
    stored = sorted(p.suffix for p in (tmp_path / "out").iterdir())
    assert stored == [".json", ".md"]
    page = next((tmp_path / "out").glob("*.md")).read_text()
    assert "## rms_norm" in page
    assert "1x64-fp32 (warm)" in page


def test_no_speedup_for_what_is_wrong(quick_limits, monkeypatch, tmp_path, capsys):
    failing = Proof(False, 1.0, 0.1, "rms_norm off by a mile")
    monkeypatch.setattr(rows, "prove", lambda *a: failing)
    argv = ["bench", "--op", "rms_norm", "--case", "1x64-fp32", "--budget", "0.02", "--no-compile"]
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
    subject = Subject(OPS["rms_norm"], TINY, "cpu", direction)
    got = subject.compiled(stock(subject.op))()(0)
    want = subject.candidate(stock(subject.op))()(0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_ours_and_stock_compute_the_same(op, direction):
    case = min((c for c in op.cases if "bench" in c.tags), key=lambda c: c.args()[0].nbytes)
    subject = Subject(op, case, "cpu", direction)
    got, want = subject.ours()(), subject.candidate(stock(op))()
    found = interleave({"ours": lambda: got, "stock": lambda: want}, max_rounds=1, min_rounds=1)
    assert not found.failed
    torch.testing.assert_close(got(0), want(0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_bound_is_the_public_function(op):
    args = next(c for c in op.cases if "quick" in c.tags).args()
    torch.testing.assert_close(bound(op, args)(), op(*args))


def test_quick_takes_one_case_a_dtype():
    for op, cases in bench.plan(quick=True):
        dtypes = [c.dtype for c in cases]
        assert len(set(dtypes)) == len(dtypes)
        assert set(dtypes) == {c.dtype for c in op.cases if "bench" in c.tags}


def test_thread_counts():
    everything = torch.get_num_threads()
    assert bench.thread_counts("cpu", None, False)[0] == everything
    assert bench.thread_counts("cpu", None, False)[-1] == 1
    assert bench.thread_counts("cpu", 3, False) == [3]
    assert bench.thread_counts("cuda", None, False) == [None]


def test_absent_peers_have_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "pip install" in peers.absent("cuda")["liger-kernel"]
    assert peers.installed("rms_norm", "cuda") == {}
    assert peers.installed("rms_norm", "cpu") == {}


def row(**changes):
    made = rows.Row("rms_norm", "norm", "8x8-fp32", "float32", "forward", 1, "cpu", 1 << 21, False)
    made.microseconds = {"fastllm": 10.0, "eager": 20.0, "compiled": 9.0, "copy": 8.0}
    made.speedup = {"eager": [2.0, 1.9, 2.1], "compiled": [0.9, 0.89, 0.91], "copy": [0.8] * 3}
    made.limit_share = 0.8
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
    run = results.header("cpu") | {"limits": [], "rows": found, "overhead": [], "absent": {}}
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
    path.write_text('{"schema": 1, ')
    with pytest.raises(CliError, match=r"run\.json"):
        results.read(path)


def test_readme_table_is_generated(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nstale\n{readme.END}\nafter\n")
    folder = tmp_path / "bench" / "results"
    small = row(case="tiny", nbytes=64, speedup={"eager": [3.0] * 3, "copy": [1.0] * 3})
    results.write(folder / "chip.json", stored([row(), small]))
    assert main(["bench", "--readme", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert "loses to compiled" in text
    assert "tiny" not in text
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
