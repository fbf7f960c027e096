"""`fastllm bench`: that ours and stock compute the same, which rows there are, the peers."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from fastllm import functional
from fastllm.cli.bench import ops, peers
from fastllm.cli.bench.ops import Inputs, as_tuple, bound, stock
from fastllm.cli.bench.plan import plan, thread_counts
from fastllm.core.measure import interleave
from fastllm.core.op import OPS
from fastllm.core.proof import relative_error

ROOT = Path(__file__).parent.parent
TINY = next(c for c in OPS["rms_norm"].cases if c.name == "1x64-fp32")


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
    inputs = Inputs(op, small_case(op), "cpu", direction)
    got, want = inputs.ours()(), inputs.candidate(stock(op))()
    found = interleave({"ours": lambda: got, "stock": lambda: want}, max_rounds=1, min_rounds=1)
    assert not found.failed
    for ours, theirs in zip(as_tuple(got(0)), as_tuple(want(0)), strict=True):
        assert relative_error(ours, theirs) < 2e-2


@pytest.mark.parametrize("op", TIMED, ids=lambda op: op.name)
def test_bound_is_the_public_function(op):
    args = small_case(op).args()
    torch.testing.assert_close(bound(op, args)(), op(*args))


def small_case(op):
    """A case of float32 that the public function takes, with something in it."""
    quick = (c for c in op.cases if "quick" in c.tags and c.dtype == torch.float32)
    for case in quick:
        args = case.args()
        if sayable(op, args) and all(a.numel() for a in args if isinstance(a, torch.Tensor)):
            return case
    raise AssertionError(f"{op.name} has no such case")


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


def test_layers_of_quant_prove_themselves_against_the_dense_one():
    from fastllm.core.subject import load
    from fastllm.quant import layer_subjects as layers

    for name in ("linear_2to4", "linear_int8_training"):
        subject = load()[name]
        assert subject.scenarios[0].wrong("cpu") is None
    other = layers._wrong((8, 64, 32), torch.float32, lambda a: torch.nn.Linear(64, 32), "cpu")
    assert "off the dense layer's" in other
    shape = (512, 512, 512)
    for make, directions in (
        (layers.sparse, (layers.FORWARD,)),
        (layers.trained, (layers.FORWARD, layers.TRAINING)),
    ):
        for direction in directions:
            torch.manual_seed(0)
            trial = layers._trial(shape, torch.float32, make, 0.5, "cpu", direction)
            found = as_tuple(trial.ours()(0))
            torch.manual_seed(0)
            wanted = as_tuple(trial.stock["eager"]()(0))
            for a, b in zip(found, wanted, strict=True):
                assert relative_error(a, b) < 0.03


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


def test_cost_counts_what_a_mask_shows():
    op, x = OPS["attention"], torch.zeros(2, 4, 8, 16)
    terms = (None, None, None, 0.0, 1.0, -1, -1, 0, 0.0)
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., :3, :2] = True
    whole = op.cost(x, x, x, None, *terms).forward_flops
    assert op.cost(x, x, x, mask, *terms).forward_flops * 64 == whole * 6
    assert op.cost(x, x, x, mask.float(), *terms).forward_flops == whole
