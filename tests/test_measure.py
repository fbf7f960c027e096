"""The timing engine: turns, rotation, threads, honesty of ratios; the limits of a machine."""

import gc
import itertools
import statistics
import time
import weakref

import pytest
import torch

from fastllm import _C
from fastllm.core import limits, measure
from fastllm.core.measure import Measurement, copies, interleave, quartiles, rotation, size_of


def spin(milliseconds):
    def factory():
        def call(i):
            end = time.perf_counter() + milliseconds / 1e3
            while time.perf_counter() < end:
                pass

        return call

    return factory


def test_ratio_of_known_candidates():
    found = interleave({"slow": spin(1.2), "fast": spin(0.3)}, budget=0.2)
    x = found.speedup("fast", over="slow")
    assert 2.5 < x.value < 5
    assert x.low <= x.value <= x.high
    assert found.speedup("slow", over="fast").value == pytest.approx(1 / x.value, rel=0.2)
    assert 1.2e-3 <= found.seconds("slow") < 5e-3


def test_turns_are_interleaved_in_changing_order():
    turns = []
    candidates = {n: (lambda n=n: lambda i: turns.append(n)) for n in "abc"}
    found = interleave(candidates, paired=True, min_rounds=10, max_rounds=10, stable=0)
    played = turns[6:]  # two warm-up calls each
    rounds = [tuple(played[i : i + 3]) for i in range(0, len(played), 3)]
    assert found.rounds == len(rounds) == 10
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_inputs_rotate_and_no_set_comes_twice_in_a_row():
    seen = []
    calls = {n: (lambda: lambda i: seen.append(i) or time.sleep(1e-3)) for n in "ab"}
    interleave(calls, sets=5, budget=0.1, max_rounds=20)
    played = seen[2 * (2 + 3) :]
    assert set(played) == set(range(5))
    assert all(a != b for a, b in itertools.pairwise(played))


def test_paired_rounds_share_a_set_and_cover_all_sets_equally():
    seen = {"a": [], "b": []}
    calls = {n: (lambda n=n: lambda i: seen[n].append(i)) for n in seen}
    found = interleave(calls, sets=3, paired=True, min_rounds=4, budget=0.0)
    assert seen["a"][2:] == seen["b"][2:] == found.sets
    assert found.rounds == 6
    assert sorted(found.sets) == [0, 0, 1, 1, 2, 2]


def test_failing_candidate_is_left_out_with_its_reason():
    def broken():
        raise ValueError("no\nkernel")

    found = interleave({"bad": broken, "good": spin(0.1)}, max_rounds=8)
    assert found.failed == {"bad": "ValueError: no"}
    assert list(found.samples) == ["good"]


def test_budget_ends_a_run_that_never_settles():
    begin = time.perf_counter()
    found = interleave({"a": spin(1), "b": spin(1)}, budget=0.15, min_rounds=3, stable=0.0)
    assert found.rounds >= 3
    assert time.perf_counter() - begin < 10


def test_tick_reaches_the_end():
    shares = []
    interleave({"a": spin(0.1)}, budget=0.02, tick=shares.append)
    assert shares[0] == pytest.approx(0, abs=0.5)
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_threads_are_set_inside_and_restored_even_after_an_error():
    before = torch.get_num_threads()
    other = 1 if before > 1 else 2
    seen = []
    interleave(
        {"a": lambda: lambda i: seen.append(torch.get_num_threads())}, threads=other, max_rounds=7
    )
    assert set(seen) == {other}
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), measure.thread_count(other):
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_collector_is_off_inside_and_on_afterwards():
    assert gc.isenabled()
    seen = []
    interleave({"a": lambda: lambda i: seen.append(gc.isenabled())}, max_rounds=7)
    assert not any(seen)
    assert gc.isenabled()


def test_results_are_dropped_within_the_call():
    alive = weakref.WeakSet()
    most = [0]

    def call(i):
        most[0] = max(most[0], len(alive))
        made = torch.empty(4)
        alive.add(made)
        return made

    interleave({"a": lambda: call}, sets=3, max_rounds=7)
    assert most[0] == 0
    assert not alive


def test_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert quartiles(values) == tuple(statistics.quantiles(values, method="inclusive"))
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_spread_and_printing():
    found = Measurement({"a": [1.0, 2.0, 3.0], "b": [2.0, 4.0, 6.0]}, [0, 0, 0])
    assert found.spread("a") == pytest.approx(0.5)
    assert str(found.speedup("a", over="b")) == "2.00x"


@pytest.mark.parametrize("nbytes", [1 << 20, 64 << 20, 1 << 30])
def test_rotation_outgrows_the_cache(nbytes):
    sets = rotation(nbytes)
    assert (sets - 1) * nbytes >= 2 * measure.last_level_cache()
    assert sets <= measure.MAX_SETS


def test_rotation_leaves_tiny_inputs_warm():
    assert rotation(256) == 1
    assert rotation(0) == 1


def test_cache_size_is_read_and_estimated_where_nothing_tells(tmp_path):
    for name, size in (("index0", "48K"), ("index3", "32M")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "size").write_text(size + "\n")
    assert measure._cpu_cache(str(tmp_path)) == 32 << 20
    assert measure._cpu_cache(str(tmp_path / "absent")) == 64 << 20


def test_copies_are_deep_and_keep_layout_and_grad():
    x = torch.randn(4, 6).t().requires_grad_()
    args = (x.detach().requires_grad_(), (3, (torch.ones(2),)), None)
    made = copies(args, 3)
    assert len(made) == 3
    assert made[0] is args
    for other in made[1:]:
        assert torch.equal(other[0], x)
        assert other[0].stride() == x.stride()
        assert other[0].requires_grad
        assert other[0].is_leaf
        assert other[0].data_ptr() != args[0].data_ptr()
        assert other[1][1][0].data_ptr() != args[1][1][0].data_ptr()
        assert other[1][0] == 3
        assert other[2] is None
    assert size_of(args) == 4 * 24 + 4 * 2


def test_one_line():
    assert measure.one_line(ValueError("a\nb")) == "ValueError: a"
    assert measure.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(measure.one_line(ValueError("x" * 500))) == 160


def test_copying_moves_what_it_says():
    call = limits.copying(1 << 12)()
    target = call(0)
    assert size_of(target) == 1 << 11  # written once, and as much read
    assert target.std() > 0.5


def test_limits_are_plausible():
    copy = limits.copy_bandwidth(8 << 20, budget=0.05)
    read = limits.read_bandwidth(8 << 20, budget=0.05)
    flops = limits.matmul_peak(torch.float32, budget=0.02, sides=(128,))
    assert 1e8 < copy < 1e13
    assert 1e8 < read < 1e13
    assert 1e8 < flops < 1e15


@pytest.mark.parametrize("isa", _C.isa_levels())
def test_arithmetic_counts_what_it_does(isa):
    before = _C.isa()
    try:
        _C.set_isa(isa)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            factory, operations = limits.arithmetic(dtype, threads=2)
            assert factory()(0) == operations == 2 * limits.arithmetic(dtype, threads=1)[1] > 0
    finally:
        _C.set_isa(before)
    assert limits.arithmetic(torch.int32) is None
    assert limits.arithmetic(torch.float32, "cuda") is None


@pytest.mark.gpu
def test_graphs_and_events_agree_on_a_gpu():
    x = torch.randn(2048, 4096, device="cuda")
    sets = rotation(size_of(x), "cuda")
    inputs = copies((x,), sets)
    calls = {"mul": lambda: lambda i: inputs[i][0] * 2}
    seconds = [
        interleave(calls, sets=sets, device="cuda", graphs=graphs, budget=0.2).seconds("mul")
        for graphs in (True, False)
    ]
    assert 0.5 < seconds[0] / seconds[1] < 2
