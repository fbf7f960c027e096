"""`fastllm tune`, fastllm.tune(model, inputs), several processes and several ranks."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fastllm
from fastllm.cli import main
from fastllm.core.op import OPS
from fastllm.core.tuner import facts, follow, jobs, routes, search, shapes, store, table

ROOT = Path(__file__).parent.parent
SHORT = ["--threads", "1", "--device", "cpu"]


@pytest.fixture
def quick(tuned, monkeypatch):
    """The tuner at work, with measurements that are rough and soon over."""
    measure = search.interleave
    monkeypatch.setattr(
        search, "interleave", lambda *a, **k: measure(*a, **{**k, "budget": 0.01, "min_rounds": 3})
    )
    return tuned


class Block(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.norm(x + self.drop(self.mix(x)))


# ---- fastllm.tune


def test_a_models_own_calls_are_tuned_and_nothing_stays_in_it(quick):
    model, x = Block(), torch.randn(3, 24)
    handle = fastllm.swap(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fastllm.tune(model, x)
    assert {c.name for c in found} >= {"add_layer_norm.forward", "add_layer_norm.training"} or {
        c.name for c in found
    } >= {"layer_norm.forward", "layer_norm.training"}
    assert all(p.grad is None for p in model.parameters()) and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert found.summary in str(found) and len(found) == len(found.changes)
    again = fastllm.tune(model, x)
    assert len(again) == 0 and again.known == len(found)
    assert len(fastllm.tune(model, x, again=True)) == len(found)
    assert list((quick / "tune").glob("*.json"))
    handle.restore()


def test_a_budget_leaves_the_rest_for_another_run(quick):
    model = Block()
    fastllm.swap(model)
    first = fastllm.tune(model, torch.randn(3, 24), budget=1e-9)
    assert len(first) == 0 and first.left > 0
    assert len(fastllm.tune(model, torch.randn(3, 24))) == first.left


def test_what_cannot_be_tuned_is_explained(tuned, monkeypatch):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, found int"):
        fastllm.tune(3, torch.randn(2))
    with pytest.raises(TypeError, match="example_inputs: expected a tensor"):
        fastllm.tune(Block(), 3)
    with pytest.raises(ValueError, match="calls none of fastllm's ops"):
        fastllm.tune(nn.Linear(24, 24), torch.randn(2, 24))
    monkeypatch.setattr(table, "MODE", "off")
    with pytest.raises(ValueError, match="FASTLLM_TUNE"):
        fastllm.tune(Block(), torch.randn(2, 24))


# ---- shapes that somebody names


def test_named_sizes_become_arguments():
    seen = shapes.of_shape(OPS["layer_norm"], "cpu", [16, 96])
    assert {s.direction for s in seen} == {"forward", "training"}
    args = seen[0].build()
    assert args[0].shape == (16, 96) and args[1] == (96,) and args[2].shape == (96,)
    assert shapes.of_shape(OPS["layer_norm"], "cpu", [1, 2, 3, 4, 5]) == []
    for text in ("16x", "axb", "0x4", "-1"):
        with pytest.raises(ValueError, match="shapes: expected sizes"):
            shapes.parse(text)


# ---- the command


def test_the_command_tunes_keeps_and_resumes(quick, capsys):
    assert main(["tune", "rms_norm", "--shapes", "8x64", *SHORT]) == 0
    text = capsys.readouterr().out
    assert "0 were known" in text and facts.file_name("cpu") in text.replace("\n", "")
    assert main(["tune", "rms_norm", "--shapes", "8x64", *SHORT]) == 0
    assert "measured 0 in" in capsys.readouterr().out
    assert main(["tune", "rms_norm", "--shapes", "8x64", "--again", *SHORT]) == 0
    assert "measured 0 in" not in capsys.readouterr().out
    assert main(["tune", "rms_norm", "--shapes", "9x128", "--budget", "1e-9", *SHORT]) == 0
    assert "are left for another run" in capsys.readouterr().out


def test_an_interrupt_keeps_what_was_found(quick, monkeypatch, capsys):
    measure, made = search.measure, []

    def third_time_interrupted(job, budget):
        made.append(job)
        if len(made) == 3:
            raise KeyboardInterrupt
        return measure(job, budget)

    monkeypatch.setattr(search, "measure", third_time_interrupted)
    command = ["tune", "rms_norm", "--shapes", "8x64", *SHORT]
    assert main(command) == 130
    assert "2 found until now are kept" in capsys.readouterr().err
    monkeypatch.setattr(search, "measure", measure)
    table.forget()
    assert main(command) == 0
    assert "2 were known" in capsys.readouterr().out


def test_a_table_to_ship_is_written(quick, capsys, tmp_path):
    out = tmp_path / "tables"
    assert main(["tune", "rms_norm", "--shapes", "8x64", "--out", str(out), *SHORT]) == 0
    path = out / facts.file_name("cpu")
    assert [p.name for p in out.iterdir()] == [path.name]
    entries = store.read(path, facts.facts("cpu"), mine=False)
    assert set(entries) == {"rms_norm.forward", "rms_norm.training"}


@pytest.mark.parametrize(
    "command, text",
    [
        (["tune", "nothing"], "no family or op is called 'nothing'"),
        (["tune", "--model", "nowhere"], "expected module:factory"),
        (["tune", "--model", "no_such_module:f"], "cannot be loaded"),
        (["tune", "--shapes", "big"], "expected sizes such as 2048x768"),
        (["tune", "rms_norm", "--shapes", "1x2x3x4x5"], "no op takes"),
        (["tune", "--model", "os.path:sep"], "cannot be loaded"),
        (["tune", "--model", "os:getpid"], "should return (model, example inputs)"),
    ],
)
def test_mistakes_are_one_line(tuned, capsys, command, text):
    assert main([*command, *SHORT]) == 2
    err = capsys.readouterr().err.strip()
    assert text in err and "\n" not in err


def test_off_is_said(tuned, monkeypatch, capsys):
    monkeypatch.setattr(table, "MODE", "off")
    assert main(["tune"]) == 2
    assert "FASTLLM_TUNE=off" in capsys.readouterr().err


def test_a_model_is_tuned_by_name(quick, capsys, monkeypatch, tmp_path):
    (tmp_path / "my_model.py").write_text(
        "import torch, fastllm\n"
        "def make():\n"
        "    return fastllm.nn.RMSNorm(40), torch.randn(3, 40)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--model", "my_model:make"]) == 0
    assert "measured 2 calls" in capsys.readouterr().out
    sys.modules.pop("my_model")


# ---- processes


def started(code, folder):
    env = {**os.environ, "FASTLLM_CACHE_DIR": str(folder), "FASTLLM_TUNE": "cached"}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)


def test_two_processes_tuning_at_once_lose_nothing(tuned):
    code = """
import sys, torch
torch.set_num_threads(1)
from fastllm.core.tuner import table
for i in range(20):
    entry = table.entry("norm", "cpu", "torch", {})
    table.learn("cpu", {"op%s": {f"key{i}": entry}})
"""
    both = [started(code % who, tuned) for who in "ab"]
    assert [p.wait(120) for p in both] == [0, 0]
    found = store.read(table.user_path("cpu"), facts.facts("cpu"))
    assert {name: len(of) for name, of in found.items()} == {"opa": 20, "opb": 20}


def test_a_process_that_is_killed_leaves_a_whole_file(tuned):
    code = """
from fastllm.core.tuner import table
for i in range(10**6):
    entry = table.entry("norm", "cpu", "torch", {})
    table.learn("cpu", {"op": {f"key{i}": entry}})
"""
    process = started(code, tuned)
    path = table.user_path("cpu")
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    before = store.read(path, facts.facts("cpu"))["op"]
    assert before
    store.merge(path, facts.facts("cpu"), {"other": {"k": {"value": 1}}})  # its lock is gone, too
    assert set(store.read(path, facts.facts("cpu"))) == {"op", "other"}


# ---- ranks


def say(op, args, value):
    made = table.entry(op.family, "cpu", value, {})
    key = routes.call_word(op, args, "cpu")
    table.learn("cpu", {f"{op.name}.forward": {key: made}}, keep=False)


def rank_main(rank, port, folder):
    os.environ["FASTLLM_CACHE_DIR"] = f"{folder}/{rank}"
    table.MODE = "cached"
    facts.shipped_folder = lambda: Path(folder) / "shipped"
    table.forget()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    op = OPS["layer_norm"]
    args = (torch.randn(4, 24), (24,), None, None, 1e-5, 0.0)
    if rank == 1:  # what this rank believes is not what counts
        say(op, args, "torch")
        assert op.select(args).name == "torch"
        search.measure = None  # it must not measure
    model = Block()
    fastllm.swap(model)
    ddp = nn.parallel.DistributedDataParallel(model)
    found = fastllm.tune(ddp, torch.randn(4, 24))
    choice = [(c.name, c.key, c.after) for c in found]
    both = [None, None]
    dist.all_gather_object(both, (choice, table.layers("cpu").process, op.select(args).name))
    assert both[0] == both[1] and choice and both[0][2] == "cpu"
    ddp(torch.randn(4, 24)).sum().backward()

    def fails():
        raise ValueError("no room")

    try:
        follow.decided_by_first("cpu", fails)
    except RuntimeError as error:
        assert "no room" in str(error)
    else:
        raise AssertionError("rank 0's error was lost")
    table.MODE = "on"  # on an ordinary call, ranks could disagree about what is unknown
    assert jobs.measure_call(op, args, "forward") is None
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_rank_0_decides_and_the_others_follow(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank_main, (port, str(tmp_path)), nprocs=2)


def test_info_says_which_table_applies(tuned, capsys):
    assert main(["info"]) == 0
    assert "heuristics; `fastllm tune` measures" in capsys.readouterr().out
    say(OPS["layer_norm"], (torch.randn(4, 24), (24,), None, None, 1e-5, 0.0), "torch")
    store.merge(table.user_path("cpu"), facts.facts("cpu"), table.layers("cpu").process)
    table.forget()
    assert main(["info"]) == 0
    assert "1 choices" in capsys.readouterr().out
