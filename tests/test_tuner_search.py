"""How the tuner measures, and what: calls, recorded models, configs."""

import pytest
import torch
from tuner_calls import LAYER, microseconds

import fastllm
from fastllm.core.measure import Measurement
from fastllm.core.op import OPS
from fastllm.core.tuner import jobs, routes, search, table
from fastllm.core.tuner.tunable import TUNABLES, Tunable
from fastllm.ops.matmul import products

# ---- measuring


def test_the_winner_is_never_far_from_the_best():
    assert search.decide([{"a": 1.0, "b": 0.5}], "a") == "b"
    assert search.decide([{"a": 1.0, "b": 0.99}], "a") == "a"  # a tie: the default stays
    assert search.decide([{"a": 1.0, "b": 0.5}, {"a": 1.0, "b": 4.0}], "a") == "a"
    assert (
        search.decide([{"a": 3.0, "b": 1.0, "c": 1.2}, {"a": 3.0, "b": 2.0, "c": 1.0}], "a") == "c"
    )


def test_within_the_noise_the_default_stays():
    assert search.decide([{"a": 1.0, "b": 0.9}], "a", {"a": 0.0, "b": 0.2}) == "a"
    assert search.decide([{"a": 1.0, "b": 0.9}], "a", {"a": 0.0, "b": 0.01}) == "b"


def test_what_wins_by_a_hiccup_is_not_found_twice(tuned, monkeypatch):
    rounds = iter(([2.0] * 5, [1.0] * 5))  # what the default takes: slow in the first heat only

    def fake(candidates, **_):
        slow = next(rounds)
        return Measurement({n: slow if n == "a" else [1.0] * 5 for n in candidates}, [0] * 5)

    monkeypatch.setattr(search, "interleave", fake)
    trial = search.Trial({"a": lambda: None, "b": lambda: None})
    job = search.Job("cpu", "toy.forward", "norm", "1 t1", (lambda: trial,))
    assert search.measure(job, 0.1).after == "a"
    assert next(rounds, None) is None


def test_a_products_library_is_measured_by_itself(tuned):
    """Also ours where the heuristic says torch: the op's own "cpu" would only ask the heuristic."""
    sizes = (96, 64, 80, True, True, torch.float32)
    candidates = products.LIBRARY.candidates("cpu", sizes)
    assert {c["library"] for c in candidates.values()} >= {"cpu", "torch"}
    found = jobs.sizes_of(jobs.of_cases([OPS["linear"]], "cpu", frozenset({"quick"})))
    assert len(found["matmul.library"]) > 10
    for name in ("cpu", "torch"):
        key = products.LIBRARY.word("cpu", sizes)
        made = table.entry("matmul", "cpu", {"library": name}, {name: 1e-6})
        table.learn("cpu", {"matmul.library": {key: made}}, keep=False)
        assert products.choose(torch.randn(96, 64), torch.randn(80, 64)) == name
    assert not jobs.of_tunables([products.LIBRARY], "cuda:0")


def test_search_finds_what_is_faster_and_keeps_it(tuned):
    slow = torch.randn(400, 400)
    job = search.Job(
        "cpu",
        "toy.forward",
        "toy",
        "key",
        (
            lambda: search.Trial(
                {"slow": lambda: lambda i: slow @ slow, "fast": lambda: lambda i: 0}
            ),
        ),
    )
    (change,) = search.search([job], each=0.05)
    assert (change.before, change.after) == ("slow", "fast") and change.changed
    assert change.ratio > 2
    table.forget()
    assert table.lookup("cpu", "toy.forward", "toy", "key") == "fast"
    assert list(search.search([job], each=0.05)) == []  # known: resumed runs go on after it
    assert next(search.search([job], each=0.05, again=True)).before == "fast"


def test_a_candidate_that_raises_cannot_win(tuned):
    def broken():
        raise RuntimeError("no such kernel")

    job = search.Job(
        "cpu", "toy", "toy", "k", (lambda: search.Trial({"a": broken, "b": lambda: lambda i: 0}),)
    )
    assert list(search.search([job], each=0.02)) == []


def test_every_op_yields_jobs_in_both_directions():
    for op in OPS.values():
        cases = jobs.of_cases([op], "cpu", frozenset({"quick"}))
        small = [
            s for s in cases if sum(a.numel() for a in s.build() if hasattr(a, "numel")) < 4096
        ]
        found = jobs.jobs_of(small[:6], "cpu", threads=1)
        rivals = any(len(jobs.rivals(op, s.build())) > 1 for s in small[:6])
        assert bool(found) == rivals, op.name
        assert all(job.key.endswith(" t1") for job in found)


def test_an_op_is_tuned_end_to_end(tuned):
    case = next(c for c in LAYER.cases if c.name == "1x64-fp32")
    sightings = [s for s in jobs.of_cases([LAYER], "cpu") if s.build()[0].shape == (1, 64)]
    found = list(search.search(jobs.jobs_of(sightings, "cpu"), each=0.05))
    assert {c.name for c in found} == {"layer_norm.forward", "layer_norm.training"}
    assert all(set(c.seconds) == {"cpu", "torch"} and c.ratio > 0 for c in found)
    args = case.args()
    chosen = {c.name: c.after for c in found if c.key == routes.call_word(LAYER, args, "cpu")}
    assert LAYER.select(args).name == chosen["layer_norm.forward"]


def test_a_models_calls_are_recorded_with_their_direction():
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), fastllm.nn.LayerNorm(12)).bfloat16()
    x = torch.randn(5, 6, dtype=torch.bfloat16)

    def once():
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
            model(x)

    before = LAYER.routes
    seen = jobs.record(once)
    assert sorted(s.direction for s in seen.calls) == ["forward", "training"]
    assert seen.devices == ["cpu"]
    assert LAYER.routes is before
    args = seen.calls[0].build()
    assert args[0].shape == (5, 12) and args[0].dtype == torch.bfloat16


def test_recorded_arguments_are_made_again_in_their_layout():
    x = torch.randn(8, 6).t()
    expanded = torch.randn(1, 8).expand(6, 8)
    ids = torch.tensor([3, 1, 2])
    again = jobs._rebuild((x, expanded, ids, None, 1.5))()
    assert again[0].stride() == x.stride() and again[1].stride() == expanded.stride()
    assert torch.equal(again[2], ids) and again[3:] == (None, 1.5)


# ---- configs


@pytest.fixture
def toy():
    """A kernel whose default block size is the slow one."""
    made = Tunable(
        "toy.blocks",
        "toy",
        configs=lambda n, dtype: [{"block": 1}, {"block": 64}],
        default=lambda n, dtype: {"block": 1},
        build=lambda device, n, dtype: (torch.randn(n, dtype=dtype, device=device),),
        run=lambda config, x: [x.add_(1) for _ in range(64 // config["block"])],
        samples=[(256, torch.float32)],
    )
    yield made
    del TUNABLES["toy.blocks"]


def test_a_config_is_measured_kept_and_found(tuned, toy):
    here = torch.device("cpu")
    assert toy(here, 256, torch.float32) == {"block": 1}
    (change,) = search.search(jobs.of_tunables([toy], "cpu"), each=0.05)
    assert change.after == {"block": 64} and change.before == {"block": 1}
    assert toy(here, 250, torch.float32) == {"block": 64}  # the same bucket
    assert toy(here, 300, torch.float32) == {"block": 1}
    assert toy(here, 256, torch.float16) == {"block": 1}
    table.forget()
    assert toy(here, 256, torch.float32) == {"block": 64}
    assert microseconds(lambda: toy(here, 256, torch.float32), torch.empty(1)) < 1


def test_a_config_is_recorded_and_measured_on_demand(tuned, toy, monkeypatch):
    here = torch.device("cpu")
    seen = jobs.record(lambda: toy(here, 100, torch.float32))
    assert seen.sizes == {"cpu": {"toy.blocks": {(100, torch.float32)}}}
    (job,) = jobs.of_tunables([toy], "cpu", seen=seen.sizes["cpu"])
    assert job.key.startswith("128 float32")
    monkeypatch.setattr(table, "MODE", "on")
    table.announce()
    assert toy(here, 100, torch.float32) == {"block": 64}


def test_a_config_of_another_form_is_not_used(tuned, toy):
    word = toy.word("cpu", (256, torch.float32))
    for value in ("torch", {"other": 1}, None):
        made = table.entry("toy", "cpu", value, {})
        table.learn("cpu", {toy.name: {word: made}}, keep=False)
        assert toy(torch.device("cpu"), 256, torch.float32) == {"block": 1}


def test_configs_that_do_not_fit_are_not_tried(toy):
    toy.fits = lambda config, device, n, dtype: config["block"] < 64
    assert list(toy.candidates("cpu", (256, torch.float32))) == ["block=1"]
    assert jobs.of_tunables([toy], "cpu") == []
