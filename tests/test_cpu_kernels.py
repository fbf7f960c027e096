"""The CPU kernels at every level of this machine: budgets, tails, threads, hostile values."""

import os
import subprocess
import sys

import pytest
import torch

from fastllm import _C
from fastllm.core.memory import POOL_FROM
from fastllm.core.op import OPS
from fastllm.core.proof import compare, run
from fastllm.ops.norm import cpu

DOT_LEVELS = ("avx512_bf16", "amx")  # the norms have no kernels of their own there
LEVELS = [name for name in _C.isa_levels() if name not in DOT_LEVELS]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROW_OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
NORMS = (*ROW_OPS, "group_norm")
CASES = [
    (name, case)
    for name in NORMS
    for case in OPS[name].cases
    if "bench" not in case.tags and case.dtype in DTYPES
]


@pytest.fixture(params=LEVELS)
def level(request):
    """Runs the test at this level and proves afterwards that it did."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    assert _C.isa() == request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine parallel regions wait long; a test that wants threads sets them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN: what a kernel does not write is seen."""
    fresh, large = cpu._empty_like, cpu.empty_like
    monkeypatch.setattr(cpu, "_empty_like", lambda t: fresh(t).fill_(float("nan")))
    monkeypatch.setattr(cpu, "empty_like", lambda t: large(t).fill_(float("nan")))


def both_ways(name, args, upstream=None, needs=None):
    """Outputs and gradients of one op on the kernels, as a list, and the upstream gradients."""
    op, backend = OPS[name], cpu.BACKENDS[name]
    out = backend.forward(*args)
    outputs = out if isinstance(out, tuple) else (out,)
    upstream = upstream or tuple(torch.randn_like(o) for o in outputs)
    saved = op.saved(args, out)
    needs = needs or (True,) * op.results
    grads = backend.backward(*upstream, *saved, needs)
    return [*outputs, *grads], upstream


def check(name, *draws):
    """Holds the kernels against stock torch's distance from float64, both ways, all draws as one.

    One draw of a single element says little: stock may be right by luck.
    """
    op = OPS[name]
    served = op.why_not("torch", draws[0]) is None
    triples = []
    for args in draws:
        values, upstream = both_ways(name, args)
        stock = run(op, args, "torch" if served else "reference", True, upstream)
        exact = run(op, double(args), "reference", True, double(upstream))
        # run() lists gradients by argument: the two terms of a residual sum share ours
        grads = op.scatter(values[op.outputs :], len(args))
        wanted = [grads[i] for i in sorted(op.gradients) if torch.is_tensor(args[i])]
        triples.append((values[: op.outputs] + wanted, stock.tensors, exact.tensors))
    joined = [
        [torch.stack(one) for one in zip(*lists, strict=True)]
        for lists in zip(*triples, strict=True)
    ]
    proofs = [compare(*four) for four in zip(stock.names, *joined, strict=True)]
    assert all(p.ok for p in proofs), "; ".join(p.message for p in proofs if not p.ok)


def double(values):
    """The tensors among them in float64."""
    return tuple(v.double() if torch.is_tensor(v) else v for v in values)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c.name}" for n, c in CASES])
def test_cases_keep_the_budget(level, name, case):
    check(name, case.args())


def rows(name, shape, dtype, weight_dtype=None, scale=1.0, shift=0.0):
    """Arguments of a row norm with every parameter."""
    weight_dtype = weight_dtype or dtype
    cols = shape[-1]
    x = (torch.randn(shape) * scale + shift).to(dtype)
    extra = (torch.randn(shape).to(dtype),) if "add" in name else ()
    params = [torch.randn(cols).to(weight_dtype) for _ in range(2 if "layer" in name else 1)]
    return (x, *extra, (cols,), *params, 1e-5, 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_every_tail(level, name, dtype):
    for cols in [*range(1, 40), 61, 64, 67, 127, 131]:
        check(name, *(rows(name, (3, cols), dtype) for _ in range(1 + 15 // cols)))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_long_rows_and_mixed_dtypes(level, name, dtype, weight_dtype):
    for cols in (4095, 8193, 40_003):
        check(name, rows(name, (2, cols), dtype, weight_dtype))


@pytest.mark.parametrize("shift", [30.0, 1e4, -3e5])
@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm"])
def test_mean_far_above_deviation(level, name, shift):
    for cols in (64, 1000, 20_000):
        check(name, rows(name, (5, cols), torch.float32, shift=shift))
    x = torch.randn(4, 5000, dtype=torch.float64).float() + shift
    exact = torch.nn.functional.layer_norm(x.double(), (5000,))
    ours = cpu.layer_norm(x, (5000,), None, None, 1e-5, 0.0)
    assert (ours - exact).abs().max() < 2e-6


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("spatial", [1, 2, 31, 32, 63, 1000, 5003])
def test_group_norm_spatial_sizes(level, spatial, groups):
    for dtype in DTYPES:
        x = (torch.randn(3, 8, spatial) * 2 + 1).to(dtype)
        if x[0].numel() == groups:
            x = torch.cat([x, x], 2)
        check("group_norm", (x, groups, torch.randn(8).to(dtype), torch.randn(8).to(dtype), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_past_the_end(level, dtype):
    """Tails and streaming stores stay inside their rows."""
    code = cpu._CODES[dtype]
    for rows_, cols in [*((2, n) for n in range(1, 70)), (1100, 2048), (1100, 2040)]:
        n, guard = rows_ * cols, 64
        x, w = torch.randn(n).to(dtype), torch.randn(cols)
        both = [torch.full((n + 2 * guard,), 7.0, dtype=dtype) for _ in range(2)]
        y, dx = (t.data_ptr() + guard * t.itemsize for t in both)
        _C.layer_norm_fwd(
            code, 0, x.data_ptr(), 0, w.data_ptr(), 0, y, 0, rows_, cols, 1e-5, 0.0, 2
        )
        dw = torch.full((cols + 2 * guard,), 7.0)
        _C.rms_norm_bwd(
            code, 0, x.data_ptr(), 0, x.data_ptr(), w.data_ptr(), dx,
            dw.data_ptr() + 4 * guard, rows_, cols, 1e-5, 0.0, 2,
        )  # fmt: skip
        for t in (*both, dw):
            assert (t[:guard] == 7.0).all() and (t[-guard:] == 7.0).all(), (rows_, cols)


def bits(tensors):
    """Tensors as integers, so that equal means the very same bits."""
    kinds = {4: torch.int32, 2: torch.int16}
    return [t.view(kinds[t.itemsize]) for t in tensors if t is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_threads_do_not_change_a_bit(level, name, dtype):
    if name == "group_norm":
        shapes = ((6, 12, 5), (5, 8, 9001))
        sets = [(torch.randn(s).to(dtype), 4, torch.randn(s[1]), None, 1e-5) for s in shapes]
    else:
        sets = [rows(name, s, dtype) for s in ((1, 64), (1031, 301), (67, 4096), (600, 4096))]
    for args in sets:
        torch.set_num_threads(1)
        first, upstream = both_ways(name, args)
        for threads in (2, 3, 4):
            torch.set_num_threads(threads)
            again, _ = both_ways(name, args, upstream)
            assert all(map(torch.equal, bits(first), bits(again))), (threads, args[0].shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROW_OPS)
def test_large_outputs_equal_small_ones(level, name, dtype):
    """Past a few megabytes rows are streamed past the caches; the bits are the same."""
    torch.set_num_threads(2)
    args = rows(name, (2 * POOL_FROM // 4096 // dtype.itemsize, 4096), dtype)
    whole, upstream = both_ways(name, args)
    grad = OPS[name].outputs
    for at in (0, 17, args[0].shape[0] - 3):
        part = tuple(a[at : at + 3] if torch.is_tensor(a) and a.dim() == 2 else a for a in args)
        few, _ = both_ways(name, part, tuple(u[at : at + 3] for u in upstream))
        same = [t[at : at + 3] for t in whole[: grad + 1]]
        assert all(map(torch.equal, bits(few[: grad + 1]), bits(same)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bit_rounding_is_torchs(level, dtype):
    """Sums round half to even, subnormals and infinities included; every pattern passes through."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    pairs = [(every, torch.zeros_like(every)), (every, every.flip(0))]
    pairs += [(every, every[torch.randperm(len(every))]) for _ in range(8)]
    near = (every.float() * (1 + 2.0**-9)).to(dtype)
    pairs.append((near, -every))
    for x, r in pairs:
        _, total = cpu.add_rms_norm(x.view(256, 256), r.view(256, 256), (256,), None, 1e-5, 0.0)
        expected = (x + r).view(256, 256)
        nan = expected.isnan()
        assert torch.equal(total.isnan(), nan)
        assert torch.equal(total[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_rounding_is_halfway_to_even(level, dtype):
    """With constant rows of ones and eps 0 the output is the weight itself, rounded once."""
    w = torch.cat([torch.randn(3000) * 10.0**p for p in (-42, -30, -8, -6, -5, -4, 0, 4, 5, 38)])
    w[:7] = torch.tensor([65519.0, 65520.0, 65536.0, 2.0**-25, 3 * 2.0**-25, -0.0, 3.4e38])
    x = torch.ones(2, len(w)).to(dtype)
    y = cpu.rms_norm(x, (len(w),), w, 0.0, 0.0)
    assert torch.equal(*bits([y[1], w.to(dtype)]))


@pytest.mark.parametrize("name", ROW_OPS)
def test_offset_counts_only_with_a_weight(level, name):
    args = list(rows(name, (4, 48), torch.float32))
    args[-1] = 1.0
    check(name, tuple(args))
    at = 3 if "add" in name else 2
    args[at] = None
    check(name, tuple(args))


@pytest.mark.parametrize("name", NORMS)
def test_only_what_is_needed_is_computed(level, name):
    if name == "group_norm":
        args = (torch.randn(2, 8, 40), 4, torch.randn(8), torch.randn(8), 1e-5)
    else:
        args = rows(name, (40, 64), torch.float32)
    full, upstream = both_ways(name, args)
    count, outputs = OPS[name].results, OPS[name].outputs
    for mask in range(1 << count):
        needs = tuple(bool(mask >> i & 1) for i in range(count))
        some, _ = both_ways(name, args, upstream, needs)
        for need, mine, theirs in zip(needs, some[outputs:], full[outputs:], strict=True):
            assert (mine is not None) == need
            assert not need or torch.equal(mine, theirs)


def test_no_gradient_at_the_residual(level):
    args = rows("add_rms_norm", (9, 70), torch.float32)
    _, total = cpu.add_rms_norm(*args)
    dy = torch.randn(9, 70)
    zeros = cpu.add_rms_norm_backward(dy, torch.zeros(9, 70), total, *args[2:], (True, True))
    none = cpu.add_rms_norm_backward(dy, None, total, *args[2:], (True, True))
    assert all(map(torch.equal, zeros, none))


def test_strided_and_expanded_gradients(level):
    args = rows("layer_norm", (12, 33), torch.float32)
    for dy in (
        torch.randn(33, 12).t(),
        torch.randn(1, 33).expand(12, 33),
        torch.ones(()).expand(12, 33),
    ):
        given, _ = both_ways("layer_norm", args, (dy,))
        plain, _ = both_ways("layer_norm", args, (dy.contiguous(),))
        assert all(map(torch.equal, given, plain))


def test_zero_rows(level):
    for name in ROW_OPS:
        values, _ = both_ways(name, rows(name, (0, 64), torch.float32))
        for value in values:
            assert value.shape[-1] == 64 and (value.numel() == 0 or (value == 0).all())
    x = torch.randn(0, 8, 5)
    values, _ = both_ways("group_norm", (x, 2, torch.randn(8), torch.randn(8), 1e-5))
    assert values[0].shape == (0, 8, 5) and (values[2] == 0).all() and (values[3] == 0).all()


def test_reasons():
    x, w = torch.randn(2, 8), torch.randn(8)
    rms, layer, add = (cpu.BACKENDS[n].supports for n in ("rms_norm", "layer_norm", "add_rms_norm"))
    assert rms(x, (8,), w, 1e-5, 0.0) is None and layer(x, (8,), w, w, 1e-5, 0.0) is None
    assert "float64 input" in rms(x.double(), (8,), None, 1e-5, 0.0)
    assert "float64 weight" in rms(x, (8,), w.double(), 1e-5, 0.0)
    assert "bias is bfloat16" in layer(x, (8,), w, w.bfloat16(), 1e-5, 0.0)
    assert layer(x, (8,), None, w, 1e-5, 0.0) is None
    assert "meta" in rms(x.to("meta"), (8,), w, 1e-5, 0.0)
    assert "weight or bias on meta" in rms(x, (8,), w.to("meta"), 1e-5, 0.0)
    assert "residual is float16" in add(x, x.half(), (8,), w, 1e-5, 0.0)
    image = torch.randn(2, 8, 4, 4)
    group = cpu.BACKENDS["group_norm"].supports
    assert group(image, 2, w, w, 1e-5) is None
    assert "channels_last" in group(image.to(memory_format=torch.channels_last), 2, w, w, 1e-5)


def test_levels():
    assert LEVELS[0] == "scalar" and _C.isa() in _C.isa_levels()
    with pytest.raises(ValueError, match=r"'avx9' is not a CPU level; available here: scalar"):
        _C.set_isa("avx9")
    for name in {"avx2", "avx512", "neon"} - set(LEVELS):
        with pytest.raises(ValueError, match="cannot run on this machine"):
            _C.set_isa(name)


def python(code, **env):
    """A fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


@pytest.mark.parametrize("name", LEVELS)
def test_the_environment_forces_a_level(name):
    done = python("from fastllm import _C; print(_C.isa())", FASTLLM_CPU_ISA=name)
    assert done.stdout.strip() == name, done.stderr


def test_the_environment_is_checked():
    done = python("from fastllm import _C", FASTLLM_CPU_ISA="sse9")
    assert done.returncode == 1
    assert "ImportError: FASTLLM_CPU_ISA: 'sse9' is not a CPU level; available" in done.stderr


def test_wrong_arguments_are_errors():
    with pytest.raises(TypeError, match="expected 12 arguments, found 1"):
        _C.rms_norm_fwd(0)
    with pytest.raises(TypeError):
        _C.rms_norm_fwd(0, 0, "x", 0, 0, 0, 0, 0, 0, 1e-5, 0.0, 1)
    with pytest.raises(OverflowError):
        _C.rms_norm_fwd(0, 0, 1 << 70, 0, 0, 0, 0, 0, 0, 1e-5, 0.0, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_hang():
    code = """
import os, torch
from fastllm.ops.norm import cpu
torch.set_num_threads(4)
x = torch.randn(512, 1024)
first = cpu.rms_norm(x, (1024,), None, 1e-5, 0.0)
child = os.fork()
if child == 0:
    again = cpu.rms_norm(x, (1024,), None, 1e-5, 0.0)
    torch.set_num_threads(1)  # torch's own parallel regions would hang here
    os._exit(0 if torch.equal(again, first) else 3)
print(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0", done.stderr
