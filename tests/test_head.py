"""The head of a call, in C: it runs what the general path would, and nothing that is watched."""

import gc
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from tuner_calls import LAYER, layer_args, microseconds, ours, say

import fastllm
from fastllm._C import Head, call_key
from fastllm.core.op import OPS
from fastllm.core.proof import wants_grad


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def quick(op, most=6):
    return [c for c in op.cases if "quick" in c.tags][:most]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("grad", [False, True])
def test_it_chooses_as_the_general_path_does(name, grad, by_size):
    op = OPS[name]
    for case in quick(op, 40):
        args = case.args()
        if grad:
            for i in op.gradients:
                if wants_grad(op, i, args[i]):
                    args[i].requires_grad_()
        key = call_key(args)
        assert key is not None, case.name
        try:
            op.check(*args)
        except (TypeError, ValueError):
            continue
        training = bool(key & 1)
        run, found = op.routes.find(args)
        wanted = op.named(None, args) or op.default(args, training)
        assert (run.name, found) == (wanted.name, training), case.name


@pytest.mark.parametrize("name", OPS)
def test_it_computes_what_the_general_path_computes(name):
    op = OPS[name]
    for case in quick(op, 3):
        args = case.args()
        again = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        found, wanted = op.routes(*args), op.general(again, None)
        assert found is not NotImplemented
        for a, b in zip(outputs(found), outputs(wanted), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


def test_it_declines_what_is_watched():
    args = layer_args()
    call = LAYER.routes
    assert call(*args) is not NotImplemented
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*args) is NotImplemented
    with FlopCounterMode(display=False):
        assert call(*args) is NotImplemented
    with torch.device("cpu"):
        assert call(*args) is NotImplemented
    with forward_ad.dual_level():
        assert call(*args) is NotImplemented
    with fastllm.backend("torch"):
        assert call(*args) is NotImplemented
    seen = []
    torch.func.vmap(lambda row: (seen.append(call(row, *args[1:])), row)[1])(args[0])
    torch.jit.trace(lambda x: (seen.append(call(x, *args[1:])), x)[1], args[0], check_trace=False)
    assert len(seen) == 2 and all(s is NotImplemented for s in seen)
    sub = args[0].as_subclass(type("Sub", (torch.Tensor,), {}))
    negative = torch._neg_view(args[0])
    for odd in (sub, negative, args[0].int(), [1.0], args[0].to("meta")):
        assert call(odd, *args[1:]) is NotImplemented
    assert call(*args) is not NotImplemented


def test_grad_mode_is_asked_every_time(tuned):
    args = layer_args(grad=True)
    assert ours(LAYER(*args))
    with torch.no_grad():
        assert LAYER(*args).grad_fn is None
    say(LAYER, args, "training", "torch")
    assert not ours(LAYER(*args)) and LAYER(*args).requires_grad


def test_a_head_asks_once_and_forgets_when_told():
    asked = []

    def look(key, args):
        asked.append(key)
        return None if args[0] < 0 else ("found", pow, None, None)

    head = Head(look)
    assert head(2, 5) == head(2, 5) == 32 and len(asked) == len(head) == 1
    assert head(-1, 5) is NotImplemented and head(-1, 5) is NotImplemented
    assert len(asked) == 3 and head.find((2, 5)) == "found" and head.find((-1, 5)) is None
    head.forget()
    assert len(head) == 0 and head(2, 5) == 32 and len(asked) == 5


def test_a_head_puts_the_backend_first_and_asks_another_where_one_declines():
    def note(*args):
        return args

    def none(*args):
        return None

    assert Head(lambda key, args: (0, note, "run", None))(1, 2) == ("run", 1, 2)
    assert Head(lambda key, args: (0, none, None, note))(1, 2) == (1, 2)
    assert Head(lambda key, args: (0, none, None, None))(1, 2) is None


def test_a_heads_errors_are_errors():
    def broken(*args):
        raise KeyError("broken")

    for wrong in ((1, 2), 5, [0, pow, None, None]):
        with pytest.raises(TypeError, match="a tuple of four or None"):
            Head(lambda key, args, wrong=wrong: wrong)(1)
    for look in (broken, lambda key, args: (0, broken, None, None)):
        with pytest.raises(KeyError):
            Head(look)(1)
    with pytest.raises(TypeError, match="keyword"):
        Head(lambda key, args: None)(1, x=2)
    with pytest.raises(TypeError):
        Head()
    with pytest.raises(TypeError):
        Head(lambda key, args: None).find([1])
    assert Head(lambda key, args: None)(*range(100)) is NotImplemented


def test_a_head_that_nobody_has_dies():
    class Mine(Head):
        def __init__(self):
            super().__init__(self.look)

        def look(self, key, args):
            return self, pow, None, None

    head = Mine()
    assert head(2, 3) == 8
    gone = weakref.ref(head)
    del head
    gc.collect()
    assert gone() is None


def test_a_call_through_the_head_adds_less_than_a_microsecond_to_the_questions_asked(tuned):
    def nothing(*args):
        return args[0]

    args = layer_args(16, 4096)
    head = Head(lambda key, given: (0, nothing, None, None))
    negative = torch.Tensor.is_neg

    def any_call():  # is a mode on, is something traced, are the bytes the values
        return call_key(()), negative(args[0]), negative(args[2]), negative(args[3])

    def added():
        return microseconds(lambda: head(*args), args[0]) - microseconds(any_call, args[0])

    assert any(added() < 1 for _ in range(20))  # a neighbour on the core doubles some of them
