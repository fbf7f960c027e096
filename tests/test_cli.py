"""The command line: help, info, check, bench, and what it says when something is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm.cli import console, main
from fastllm.core.backend import Backend
from fastllm.core.op import OPS

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def few_threads():
    """More would only spin against each other where tests share the cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


def stock_rms_norm(*args):
    return OPS["rms_norm"].backends["torch"].forward(*args)


@pytest.fixture
def broken_backend(monkeypatch):
    """A `triton` backend of rms_norm that is wrong by a little."""

    def forward(*args):
        return stock_rms_norm(*args) * 1.001

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
    absent = Backend("triton", stock_rms_norm, available=lambda: "no such chip")
    monkeypatch.setitem(OPS["rms_norm"].backends, "triton", absent)
    assert main(["check", "rms_norm", "--backend", "triton"]) == 2
    assert "nothing could be checked" in one_error(capsys)
