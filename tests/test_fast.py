"""Compiled fast calls: they serve what is ordinary, decline everything else, and leak nothing."""

import gc
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastllm
from fastllm import _C
from fastllm.core.op import OPS

FAST = [name for name, op in OPS.items() if op.fast is not None]
each_fast = pytest.mark.parametrize("name", FAST)


def arguments(name, rows=3, cols=40, dtype=torch.float32, requires_grad=False):
    x = torch.randn(rows, cols, dtype=dtype, requires_grad=requires_grad)
    w, b = torch.randn(cols, dtype=dtype), torch.randn(cols, dtype=dtype)
    extra = (torch.randn(rows, cols, dtype=dtype),) if "add" in name else ()
    params = (w, b) if "layer" in name else (w,)
    return (x, *extra, (cols,), *params, 1e-6, 0.5)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def test_norms_have_fast_calls():
    assert FAST == ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"]


@each_fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3, 4096], ids=str)
def test_agrees_with_the_backend(name, dtype, rows):
    args = arguments(name, rows=rows, cols=257, dtype=dtype)
    fast = outputs(OPS[name].fast(*args))
    slow = outputs(OPS[name].backends["cpu"].forward(*args))
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and not a.requires_grad


@each_fast
def test_wants_grad(name):
    args = arguments(name, requires_grad=True)
    assert OPS[name].fast(*args) is True
    with torch.no_grad():
        assert OPS[name].fast(*args) is not True
    with torch.inference_mode():
        assert outputs(OPS[name].fast(*args))[0].is_inference()


def declined(name):
    """Calls that are not ordinary, by what is special about them."""
    args = arguments(name)
    x, shape_at = args[0], 2 if "add" in name else 1
    yield "strides", (x.t().contiguous().t(), *args[1:])
    yield "dtype", (x.double(), *args[1:])
    yield "integers", (x.int(), *args[1:])
    yield "device", (x.to("meta"), *args[1:])
    yield "shape", (*args[:shape_at], (39,), *args[shape_at + 1 :])
    yield "negative", (*args[:shape_at], (-40,), *args[shape_at + 1 :])
    yield "empty shape", (*args[:shape_at], (), *args[shape_at + 1 :])
    yield "list", (*args[:shape_at], [40], *args[shape_at + 1 :])
    yield "text", (*args[:shape_at], ("a",), *args[shape_at + 1 :])
    yield "weight", (*args[: shape_at + 1], args[shape_at + 1][:-1], *args[shape_at + 2 :])
    yield "no tensor", ([1.0], *args[1:])
    yield "eps", (*args[:-2], "small", args[-1])
    yield "subclass", (x.as_subclass(type("Sub", (torch.Tensor,), {})), *args[1:])
    if "add" in name:
        yield "residual", (x, args[1][:1], *args[2:])
        yield "residual dtype", (x, args[1].half(), *args[2:])
    if "layer" in name:
        yield "bias dtype", (*args[:-3], args[-3].half(), *args[-2:])


@each_fast
def test_declines_what_is_not_ordinary(name):
    for what, args in declined(name):
        assert OPS[name].fast(*args) is None, what
        if isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            wants = args[0].detach().requires_grad_()
            assert OPS[name].fast(wants, *args[1:]) is None, f"{what}, with gradients"


@each_fast
def test_declines_under_modes(name):
    call, args = OPS[name].fast, arguments(name)
    assert call(*args) is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*args) is None
    with FlopCounterMode(display=False):
        assert call(*args) is None
    with torch.device("cpu"):
        assert call(*args) is None
    with forward_ad.dual_level():
        assert call(*args) is None
    with fastllm.backend("torch"):
        assert call(*args) is None
    torch.func.vmap(lambda row: (_none(call(row, *args[1:])), row)[1])(args[0])
    assert call(*args) is not None


def _none(value):
    assert value is None


def test_wrong_argument_count_is_a_type_error():
    with pytest.raises(TypeError, match="expected 5 arguments, found 1"):
        _C.fast_rms_norm(1)


@each_fast
def test_leaks_nothing(name):
    args = arguments(name)
    broken = [bad for _, bad in declined(name)]

    def counts():
        gc.collect()
        return [sys.getrefcount(a) for a in args] + [sys.getrefcount(None) // 1000]

    for _ in range(3):
        OPS[name].fast(*args)
    before = counts()
    for _ in range(2000):
        OPS[name].fast(*args)
    for bad in broken:
        OPS[name].fast(*bad)
    del bad
    after = counts()
    assert all(abs(a - b) < 30 for a, b in zip(after, before, strict=True))
    out = outputs(OPS[name].fast(*args))
    assert [sys.getrefcount(o) for o in out] == [3] * len(out)  # out, o, the argument


def test_a_choice_of_backend_stays_in_its_thread():
    args = arguments("rms_norm")
    seen = []
    with fastllm.backend("reference"):
        worker = threading.Thread(target=lambda: seen.append(OPS["rms_norm"].select(args).name))
        worker.start()
        worker.join()
        assert OPS["rms_norm"].select(args).name == "reference"
    assert seen == ["cpu"]
