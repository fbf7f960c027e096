"""Forwards in C: they serve what is plain, decline everything else, and leak nothing."""

import gc
import sys
import threading

import pytest
import torch

import fastllm
from fastllm.core.op import OPS
from fastllm.quant import quantize

CALLS = {name: b.fast for name, op in OPS.items() for b in op.implementations if b.fast is not None}
NORMS = ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"]
UNARY = {"silu": (), "gelu": ("tanh",), "relu2": (), "softmax": (-2,), "log_softmax": (1,)}
GATED = {"swiglu": (), "geglu": ("none",)}
READS = ["embedding"]
CODES = ["quant_linear"]
each_fast = pytest.mark.parametrize("name", CALLS)


def arguments(name, rows=3, cols=40, dtype=torch.float32):
    x = torch.randn(rows, cols, dtype=dtype)
    if name in READS:  # large reads are left to the backend
        places = torch.randint(0, 50, (min(rows, 1000), 1))
        return (torch.randn(50, cols, dtype=dtype), places, 3, False)
    if name in CODES:
        q = quantize(torch.randn(50, cols), "int4_asym_g32")
        bias = torch.randn(50, dtype=dtype)
        return (x, q.codes, q.scales, q.zeros, bias, None, q.format.code, 32, 0, "gelu", 0.0)
    if name in UNARY:
        return (x, *UNARY[name])
    if name in GATED:
        return (x, torch.randn(rows, cols, dtype=dtype), *GATED[name])
    w, b = torch.randn(cols, dtype=dtype), torch.randn(cols, dtype=dtype)
    extra = (torch.randn(rows, cols, dtype=dtype),) if "add" in name else ()
    params = (w, b) if "layer" in name else (w,)
    return (x, *extra, (cols,), *params, 1e-6, 0.5)


def outputs(value):
    return value if isinstance(value, tuple) else (value,)


def test_who_has_fast_calls():
    assert sorted(CALLS) == sorted([*NORMS, *UNARY, *GATED, *READS, *CODES])


@each_fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 3, 4096], ids=str)
def test_agrees_with_the_backend(name, dtype, rows):
    if name in CODES:  # no rows and large results are left to the backend
        rows = min(max(rows, 1), 1000)
    args = arguments(name, rows=rows, cols=257, dtype=dtype)
    fast = outputs(CALLS[name](*args))
    slow = outputs(OPS[name].backends["cpu"].forward(*args))
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride() and not a.requires_grad


@each_fast
def test_inference_tensors_stay_that(name):
    with torch.inference_mode():
        assert outputs(CALLS[name](*arguments(name)))[0].is_inference()


def declined(name):
    """Calls that are not ordinary, by what is special about them."""
    args = arguments(name)
    x = args[0]
    yield "strides", (x.t().contiguous().t(), *args[1:])
    yield "dtype", (x.double(), *args[1:])
    yield "integers", (x.int(), *args[1:])
    yield "device", (x.to("meta"), *args[1:])
    yield "no tensor", ([1.0], *args[1:])
    if name in READS:
        for bad in (50, -1):
            yield f"index {bad}", (x, torch.tensor([0, bad]), *args[2:])
        yield "small indices", (x, args[1].short(), *args[2:])
        yield "float indices", (x, args[1].float(), *args[2:])
        yield "indices apart", (x, torch.zeros(4, 2, dtype=torch.int64)[:, 0], *args[2:])
        yield "vector", (x[0], *args[1:])
        yield "much", (x, torch.zeros(20_000, dtype=torch.int64), *args[2:])
        yield "dims", (x, torch.zeros((1,) * 9, dtype=torch.int64), *args[2:])
    if name in CODES:
        for at, bad in (
            (1, args[1][:, 1:].contiguous()), (1, args[1][0]), (1, args[1].int()),
            (2, args[2][1:]), (2, args[2].t().contiguous().t()), (2, args[2].long()),
            (3, args[3][1:]), (3, args[3].double()), (4, args[4][1:]), (4, args[4].half()),
            (6, 7), (6, 0), (7, 16), (7, "rows"), (8, 2), (9, "cos"), (9, 1), (10, 6.0),
        ):  # fmt: skip
            yield f"argument {at}", (*args[:at], bad, *args[at + 1 :])
        yield "much", (x.new_zeros(20_000, x.shape[1]), *args[1:])
        yield "nothing", (x[:0], *args[1:])
    if name in ("softmax", "log_softmax"):
        for dim in (2, -3, 1.0, None, 1 << 70):
            yield f"dim {dim}", (x, dim)
        yield "scalar", (torch.tensor(1.0), 0)
    if name in ("gelu", "geglu"):
        yield "approximate", (*args[:-1], "erf")
        yield "approximate", (*args[:-1], 1)
    if "glu" in name:
        yield "up", (x, args[1][:1], *args[2:])
        yield "up dtype", (x, args[1].half(), *args[2:])
    if name not in NORMS:
        return
    at = 2 if "add" in name else 1
    yield "shape", (*args[:at], (39,), *args[at + 1 :])
    yield "negative", (*args[:at], (-40,), *args[at + 1 :])
    yield "empty shape", (*args[:at], (), *args[at + 1 :])
    yield "list", (*args[:at], [40], *args[at + 1 :])
    yield "text", (*args[:at], ("a",), *args[at + 1 :])
    yield "weight", (*args[: at + 1], args[at + 1][:-1], *args[at + 2 :])
    yield "eps", (*args[:-2], "small", args[-1])
    if "add" in name:
        yield "residual", (x, args[1][:1], *args[2:])
        yield "residual dtype", (x, args[1].half(), *args[2:])
    if "layer" in name:
        yield "bias dtype", (*args[:-3], args[-3].half(), *args[-2:])


@each_fast
def test_declines_what_is_not_plain(name):
    for what, args in declined(name):
        assert CALLS[name](*args) is None, what


def test_wrong_argument_count_is_a_type_error():
    for name, count in (("rms_norm", 5), ("silu", 1), ("gelu", 2), ("swiglu", 2), ("softmax", 2)):
        with pytest.raises(TypeError, match=f"expected {count} arguments, found 3"):
            CALLS[name](1, 2, 3)


@each_fast
def test_leaks_nothing(name):
    args = arguments(name)
    broken = [bad for _, bad in declined(name)]
    calls = (CALLS[name], OPS[name])

    def counts():
        gc.collect()
        return [sys.getrefcount(a) for a in args] + [sys.getrefcount(None) // 1000]

    for call in calls:
        call(*args)
    before = counts()
    for _ in range(2000):
        for call in calls:
            call(*args)
    for bad in broken:
        CALLS[name](*bad)
    del bad
    after = counts()
    assert all(abs(a - b) < 30 for a, b in zip(after, before, strict=True))
    for call in calls:
        out = outputs(call(*args))
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
