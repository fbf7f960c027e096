"""The tuner: what wins is what runs, and asking is cheap."""

import pytest
import torch
import torch.nn.functional as F
from tuner_calls import LAYER, layer_args, microseconds, ours, say

import fastllm
from fastllm import _C
from fastllm.core.op import OPS
from fastllm.core.proof import run
from fastllm.core.tuner import routes, search

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
    with pytest.raises(TypeError):
        LAYER.routes.find([x])


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
    find, guards, negative = LAYER.routes.find, _C.call_key, torch.Tensor.is_neg

    def any_call():  # is a mode on, is something traced, are the bytes the values
        return guards((), None), negative(args[0]), negative(args[2]), negative(args[3])

    assert microseconds(lambda: find(args), args[0]) - microseconds(any_call, args[0]) < 1


def test_shapes_that_never_repeat_do_not_fill_the_memory(tuned, monkeypatch):
    monkeypatch.setattr(routes, "_MOST", 10)
    say(LAYER, layer_args(), "forward", "torch")
    for rows in range(1, 50):
        LAYER(*layer_args(rows))
    assert 0 < len(LAYER.routes) <= 10


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
