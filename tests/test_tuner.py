"""The tuner: what wins is what runs, asking is cheap, nothing is measured unless asked for."""

import threading
import timeit

import pytest
import torch
import torch.nn.functional as F

import fastllm
from fastllm import _C
from fastllm.core.measure import Measurement
from fastllm.core.op import OPS
from fastllm.core.proof import run
from fastllm.core.tuner import facts, jobs, routes, search, store, table
from fastllm.core.tuner.tunable import TUNABLES, Tunable
from fastllm.ops.matmul import products

LAYER = OPS["layer_norm"]


def layer_args(rows=4, cols=48, dtype=torch.float32, grad=False):
    x = torch.randn(rows, cols, dtype=dtype, requires_grad=grad)
    w, b = (torch.randn(cols, dtype=dtype, requires_grad=grad) for _ in range(2))
    return x, (cols,), w, b, 1e-5, 0.0


def say(op, args, direction, value, keep=False):
    """Puts a choice into the table."""
    key = routes.call_word(op, args, "cpu")
    made = table.entry(op.family, "cpu", value, {value: 1e-6})
    table.learn("cpu", {f"{op.name}.{direction}": {key: made}}, keep)


def ours(out):
    """Whether a result came out of an autograd.Function of ours."""
    return isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)


def microseconds(call, like):
    """What a call takes on an idle machine: in units of a known attribute, as load slows both."""
    number, found = 1000, []
    for _ in range(30):
        took = timeit.timeit(call, number=number)
        found.append(took / timeit.timeit(lambda: like.shape, number=number))
    return min(found) * 0.17  # a tensor's shape takes that long


# ---- what runs


def test_the_first_call_without_a_cache_measures_nothing(tuned, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("an ordinary call measured something")

    monkeypatch.setattr(search, "interleave", never)
    monkeypatch.setattr("fastllm.core.measure.interleave", never)
    for op in OPS.values():
        case = next(c for c in op.cases if "quick" in c.tags)
        run(op, case.args(), None, bool(op.gradients))
    assert not list(tuned.rglob("*.json"))


def test_an_op_that_no_table_mentions_is_not_asked_about(tuned):
    assert LAYER.routes is not None
    LAYER(*layer_args())
    assert LAYER.routes is None
    say(LAYER, layer_args(), "forward", "torch")
    assert LAYER.routes is not None


def test_forward_and_training_are_chosen_apart(tuned):
    args = layer_args(grad=True)
    assert ours(LAYER(*args))
    say(LAYER, args, "training", "torch")
    assert not ours(LAYER(*args))
    assert LAYER.select(args).name == "cpu"
    with torch.no_grad():
        assert torch.equal(LAYER(*args), LAYER(*args, backend="cpu"))
    say(LAYER, args, "forward", "torch")
    assert LAYER.select(args).name == "torch"
    with torch.no_grad():
        assert torch.equal(LAYER(*args), F.layer_norm(*args[:5]))
    assert ours(LAYER(*layer_args(cols=640, grad=True)))  # another bucket


def test_a_forced_backend_goes_before_the_table(tuned):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch")
    say(LAYER, args, "forward", "torch")
    assert ours(LAYER(*args, backend="cpu"))
    with fastllm.backend("cpu"):
        assert ours(LAYER(*args)) and LAYER.select(args).name == "cpu"


def test_what_the_table_names_must_be_able_to_serve(tuned):
    args = layer_args(grad=True)
    for name in ("cuda", "no such backend", ["cpu"], None, 3):
        say(LAYER, args, "training", name) if isinstance(name, str) else None
        assert ours(LAYER(*args))


def test_threads_and_deterministic_mode_have_their_own_answers(tuned):
    args = layer_args(grad=True)
    torch.set_num_threads(2)
    say(LAYER, args, "training", "torch")
    assert not ours(LAYER(*args))
    torch.set_num_threads(1)
    assert ours(LAYER(*args))
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    try:  # what this machine measured is not reproducible elsewhere
        assert ours(LAYER(*args))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not ours(LAYER(*args))


@pytest.mark.parametrize("name", list(OPS))
def test_a_routed_op_keeps_its_contract(tuned, name):
    """Whatever the table says: same results as when forced, under every mode that torch has."""
    op = OPS[name]
    if not op.gradients or "torch" not in op.backends:
        pytest.skip("no choice between differentiable backends")
    case = next(
        c
        for c in op.cases
        if c.dtype == torch.float32 and "quick" in c.tags and op.why_not("torch", c.args()) is None
    )
    args = case.args()
    for direction in (routes.FORWARD, routes.TRAINING):
        say(op, args, direction, "torch")
    found, wanted = run(op, args, None, True), run(op, args, "torch", True)
    again = run(op, args, "torch", True, found.upstream)
    assert len(found.tensors) == len(wanted.tensors)
    for a, b in zip(found.tensors, again.tensors, strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    outputs = compiled(*args)
    eager = op(*args)
    for a, b in zip(_tuple(outputs), _tuple(eager), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len(_tuple(op(*args))) == len(_tuple(eager))


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_wrong_arguments_are_explained_as_ever(tuned):
    say(LAYER, layer_args(), "forward", "torch")
    x, shape, w, b, *rest = layer_args()
    with pytest.raises(ValueError, match="weight: expected shape"):
        LAYER(x, shape, w[:3], b, *rest)
    with pytest.raises(TypeError, match="input: expected a Tensor"):
        LAYER("x", shape, w, b, *rest)
    with pytest.raises(TypeError, match="input"):
        LAYER(x.int(), shape, w, b, *rest)


# ---- the number of a call


def test_call_keys_tell_calls_apart():
    x, shape, w, b, eps, offset = layer_args(8, 48)
    calls = {
        "plain": (x, shape, w, b, eps, offset),
        "dtype": (x.half(), shape, w, b, eps, offset),
        "weight dtype": (x, shape, w.half(), b, eps, offset),
        "rows": (x[:7], shape, w, b, eps, offset),
        "split rows": (x.view(2, 4, 48), shape, w, b, eps, offset),
        "strides": (x.t().contiguous().t(), shape, w, b, eps, offset),
        "expanded": (x[:1].expand(8, 48), shape, w, b, eps, offset),
        "no bias": (x, shape, w, None, eps, offset),
        "no weight": (x, shape, None, b, eps, offset),
        "eps": (x, shape, w, b, 1e-6, offset),
        "offset": (x, shape, w, b, eps, 1.0),
        "gradients": (x.clone().requires_grad_(), shape, w, b, eps, offset),
    }
    numbers = {name: _C.call_key(args, None) for name, args in calls.items()}
    assert len(set(numbers.values())) == len(calls), numbers
    assert all((n & 1) == (name == "gradients") for name, n in numbers.items())
    assert _C.call_key((x.clone(), shape, w.clone(), b, eps, offset), None) == numbers["plain"]
    grad = calls["gradients"]
    with torch.no_grad():
        assert _C.call_key(grad, None) == numbers["plain"]
    assert _C.call_key(grad, False) == numbers["plain"]
    assert _C.call_key(calls["plain"], True) == numbers["gradients"]


def test_what_is_no_plain_call_has_no_key():
    x = torch.randn(2, 3)
    sub = x.as_subclass(type("Sub", (torch.Tensor,), {}))
    for odd in (sub, x.to_sparse(), [1], {}, torch.empty(2, device="meta")):
        assert _C.call_key((x, odd), None) is None or isinstance(odd, torch.Tensor)
    assert _C.call_key((sub,), None) is None and _C.call_key(([1],), None) is None
    with pytest.raises(TypeError):
        _C.call_key([x], None)


@pytest.mark.parametrize(
    "size, found",
    [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (768, 768), (769, 1024)],
)
def test_buckets(size, found):
    assert routes.bucket(size) == found


def test_a_lookup_adds_less_than_a_microsecond(tuned):
    args = layer_args(16, 4096)
    say(LAYER, args, "forward", "cpu")
    say(LAYER, layer_args(2, 8), "forward", "torch")
    find, guards, negative = LAYER.routes.find, routes.call_key, torch.Tensor.is_neg

    def any_call():  # is a mode on, is something traced, are the bytes the values
        return guards((), None), negative(args[0]), negative(args[2]), negative(args[3])

    assert microseconds(lambda: find(args), args[0]) - microseconds(any_call, args[0]) < 1


def test_shapes_that_never_repeat_do_not_fill_the_memory(tuned, monkeypatch):
    monkeypatch.setattr(routes, "_MOST", 10)
    say(LAYER, layer_args(), "forward", "torch")
    for rows in range(1, 50):
        LAYER(*layer_args(rows))
    assert len(LAYER.routes.known) <= 10


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
    assert LAYER.routes is None and ours(LAYER(*args))


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

    seen = jobs.record(once)
    assert sorted(s.direction for s in seen.calls) == ["forward", "training"]
    assert seen.devices == ["cpu"]
    assert LAYER.routes is None  # as before
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


# ---- before anything was measured


@pytest.mark.parametrize(
    ("name", "small", "large"),
    [
        ("silu", (8,), (1 << 14,)),
        ("swiglu", (8,), (1 << 13,)),
        ("softmax", (8,), (1 << 16,)),
    ],
)
def test_the_smallest_calls_are_torchs(name, small, large, tuned, by_size):
    op = OPS[name]
    count = len(op.tensors)
    rest = (0,) if name == "softmax" else ()
    for shape, expected in ((small, "torch"), (large, "cpu")):
        args = (*(torch.randn(shape) for _ in range(count)), *rest)
        run, training = op.routes.find(args)
        assert run.name == expected and not training
        assert torch.equal(op(*args), op(*args, backend=expected))
        say(op, args, "forward", "cpu" if expected == "torch" else "torch")
        assert op.routes.find(args)[0].name != expected  # what was measured counts


def test_calls_that_differ_in_a_number_are_apart(tuned):
    op, x = OPS["softmax"], torch.randn(4, 6)
    assert torch.allclose(op(x, -1), torch.softmax(x, -1))
    assert torch.allclose(op(x, -2), torch.softmax(x, -2))  # hash(-1) is hash(-2)
    with pytest.raises((IndexError, ValueError)):
        op(x[0], -2)
