"""What was measured is kept: files, layers of them, processes side by side."""

import threading

import pytest
import torch
from tuner_calls import LAYER, layer_args, ours, say

from fastllm import _C
from fastllm.core.tuner import facts, routes, search, store, table

# ---- files


def test_what_was_learned_is_found_by_the_next_process(tuned):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch", keep=True)
    table.forget()
    assert not ours(LAYER(*args))
    assert [p.name for p in (tuned / "tune").glob("*.json")] == [facts.file_name("cpu")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "\x00\xff" * 100,
        lambda text: "[1, 2]",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"isa": "', '"isa": "other '),
        lambda text: text.replace('"value"', '"worth"'),
    ],
    ids=["truncated", "empty", "binary", "list", "format", "device", "entries"],
)
def test_a_broken_file_is_set_aside_with_one_warning(tuned, damage):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch", keep=True)
    path = table.user_path("cpu")
    path.write_text(damage(path.read_text()))
    table.forget()
    with pytest.warns(RuntimeWarning, match="set-aside") as seen:
        assert ours(LAYER(*args))
        assert ours(LAYER(*args))
    assert len(seen) == 1 and not path.exists()
    assert path.with_name(path.name + ".set-aside").exists()
    say(LAYER, args, "training", "torch", keep=True)
    assert path.exists()


def test_entries_of_other_kernels_are_not_used(tuned, monkeypatch):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch", keep=True)
    monkeypatch.setattr(facts, "source_hash", lambda family, kind: "another")
    table.forget()
    assert ours(LAYER(*args))


def test_kernel_sources_are_told_apart():
    norm, other = facts.source_hash("norm", "cpu"), facts.source_hash("no such family", "cpu")
    assert "norm:" in _C.sources and norm != other
    assert facts.source_hash("norm", "cuda") not in (norm, facts.source_hash("other", "cuda"))


def test_every_part_of_a_kernel_counts(monkeypatch):
    def hashed(**sources):
        monkeypatch.setattr(facts, "_triton_sources", lambda: sources)
        return facts.source_hash.__wrapped__("attention", "cuda")

    before = hashed(attention="a", attention_decode="b", norm="c")
    assert hashed(attention="a", attention_decode="changed", norm="c") != before
    assert hashed(attention="a", attention_decode="b", norm="changed") == before


def test_entries_of_another_version_are_in_another_file(tuned, monkeypatch):
    before = table.user_path("cpu")
    monkeypatch.setattr(facts, "_cpu", lambda isa: {"isa": isa, "torch": "9.9"})
    assert table.user_path("cpu") != before


def test_a_cache_that_cannot_be_written_is_a_warning(tuned, monkeypatch):
    blocked = tuned / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FASTLLM_CACHE_DIR", str(blocked))
    args = layer_args(grad=True)
    with pytest.warns(RuntimeWarning):
        say(LAYER, args, "training", "torch", keep=True)
    assert not ours(LAYER(*args))


def test_two_writers_lose_nothing(tuned):
    path, known = table.user_path("cpu"), facts.facts("cpu")

    def write(who):
        for i in range(25):
            store.merge(path, known, {f"op{who}": {f"key{i}": {"value": who, "source": ""}}})

    workers = [threading.Thread(target=write, args=(who,)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = store.read(path, known)
    assert {name: len(of) for name, of in found.items()} == {f"op{who}": 25 for who in range(4)}
    assert not [p for p in path.parent.iterdir() if p.suffix == ".tmp"]


def test_layers_are_asked_in_order(tuned):
    args = layer_args(grad=True)
    key, name = routes.call_word(LAYER, args, "cpu"), "layer_norm.training"
    path = facts.shipped_folder() / facts.file_name("cpu")
    path.parent.mkdir()
    shipped = table.entry("norm", "cpu", "torch", {})
    store.write(path, facts.facts("cpu"), {name: {key: shipped}})
    table.forget()
    assert not ours(LAYER(*args))
    torch.use_deterministic_algorithms(True)
    try:
        assert not ours(LAYER(*args))
    finally:
        torch.use_deterministic_algorithms(False)
    say(LAYER, args, "training", "cpu", keep=True)
    assert ours(LAYER(*args))
    table.forget()
    assert ours(LAYER(*args))


def test_off_asks_nobody(tuned, monkeypatch):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch")
    monkeypatch.setattr(table, "MODE", "off")
    table.announce()
    assert ours(LAYER(*args))


def test_on_measures_an_unknown_call_once(tuned, monkeypatch):
    made = []

    def count(*args, **kwargs):
        made.append(1)
        return measure(*args, **{**kwargs, "budget": 0.02})

    measure = search.interleave
    monkeypatch.setattr(search, "interleave", count)
    monkeypatch.setattr(table, "MODE", "on")
    table.announce()
    args = layer_args()
    for _ in range(3):
        LAYER(*args)
    assert len(made) == 1
    assert table.lookup("cpu", "layer_norm.forward", "norm", routes.call_word(LAYER, args, "cpu"))
    table.forget()
    LAYER(*args)
    assert len(made) == 1  # the next process knows


def test_modes_are_checked():
    assert [table.mode_of(t) for t in (None, "", "OFF", "on")] == ["cached", "cached", "off", "on"]
    with pytest.raises(ValueError, match="FASTLLM_TUNE: expected one of off, cached, on"):
        table.mode_of("maybe")
