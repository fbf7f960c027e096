"""The kernels on codes in CUDA C++, run by the emulator of tests/cuda_on_cpu: kernels and what
Python does around them are those of a GPU; the tensors are on the CPU."""

import ctypes
import types

import pytest
import torch
from test_cuda import emulated

from fastllm.core.proof import compare
from fastllm.ops.quant import cuda, dequantize_op, quantize_op
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant_linear import cuda as linear
from fastllm.ops.quant_linear import quant_linear_op, reference, stock

INT, LONG, PLACE, BITS = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_uint64
WEIGHT = [INT, PLACE, LONG, LONG, LONG, PLACE, PLACE, INT, LONG, LONG, PLACE]
ARGUMENTS = {
    "gemv": [INT, PLACE, LONG, LONG, *WEIGHT, PLACE, PLACE],
    "dequantize": [INT, *WEIGHT, PLACE],
    "quantize": [INT, INT, PLACE, LONG, LONG, LONG, PLACE, PLACE, PLACE, ctypes.c_char_p, BITS],
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("quant", tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def calls(library, monkeypatch):
    """fastllm._cuda by the emulator, for tensors on the CPU; the names of what was called."""
    made = []

    def call(name):
        function = getattr(library, f"emulate_{name}")
        function.argtypes = ARGUMENTS[name]

        def run(*args):
            made.append(name)
            assert function(*args[:-2]) == 0  # the device and the stream

        return run

    fake = types.SimpleNamespace(
        quant_gemv=call("gemv"),
        quant_dequantize=call("dequantize"),
        quantize=call("quantize"),
    )
    for module in (cuda, linear):
        monkeypatch.setattr(module, "_cuda", fake)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    return made


BACKENDS = {**cuda.BACKENDS, "quant_linear": linear.BACKEND}


def served(op, case):
    """The arguments of a case, if the kernels take them and the emulator has the time for them."""
    if "bench" in case.tags or case.dtype == torch.float64:
        return None
    args = case.args()
    small = sum(t.numel() for t in args if isinstance(t, torch.Tensor)) < 30_000
    return args if small and BACKENDS[op.name].supports(*args) is None else None


@pytest.mark.parametrize("op", [dequantize_op, quant_linear_op], ids=lambda op: op.name)
def test_cases_keep_the_error_budget(op, calls):
    count = 0
    for case in op.cases:
        args = served(op, case)
        if args is None:
            continue
        double = [
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        ]
        exact = op.reference(*[torch.float64 if isinstance(a, torch.dtype) else a for a in double])
        stock = op.backends["torch"].forward(*args)
        proof = compare(case.name, BACKENDS[op.name].forward(*args), stock, exact)
        assert proof.ok, proof.message
        count += 1
    assert count >= 9 and len(calls) >= count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize("kind", cuda.KINDS)
def test_tokens_and_rows_that_do_not_fill_a_block(kind, tokens, dtype, calls):
    """More chunks than lanes in a row, rows that end a block early, tokens one by one."""
    weight = torch.randn(7, 1184)
    codes, scales, _ = quant.quantize(weight, kind, 32, True)
    x = torch.randn(tokens, 1184).to(dtype)
    args = (x, codes, scales, None, None, None, kind, 32, 0)
    exact = reference.quant_linear(x.double(), codes, scales.double(), *args[3:])
    proof = compare("y", linear.quant_linear(*args), stock.quant_linear(*args), exact)
    assert proof.ok, proof.message
    assert calls == ["gemv"]


def same(made, wanted):
    """The same codes, scales and zero points; NaN is a scale like others."""
    for value, right in zip(made, wanted, strict=True):
        assert value.dtype == right.dtype and value.shape == right.shape
        value, right = (t.float().nan_to_num(nan=-1e30) for t in (value, right))
        assert torch.equal(value, right)


def test_quantize_makes_the_codes_of_the_reference(calls):
    """All cases the kernel takes: zeros, ties, NaN, infinities, subnormal and huge values."""
    count = 0
    for case in quantize_op.cases:
        args = served(quantize_op, case)
        if args is not None:
            same(BACKENDS["quantize"].forward(*args), quant.quantize(*args))
            count += 1
    assert count >= 100 and calls == ["quantize"] * count


# one lane a group, part of a warp, short last groups, a warp, a block, more than a block keeps
GROUPS = ((9, 40, 8), (5, 96, 24), (3, 200, 64), (2, 264, 256), (2, 2056, 0), (2, 9224, 0))


@pytest.mark.parametrize(
    "kind, symmetric", [(0, True), (1, True), (1, False), (2, True), (3, True)]
)
@pytest.mark.parametrize("shape", GROUPS, ids=str)
def test_quantize_with_teams_of_every_size(shape, kind, symmetric, calls):
    rows, k, group = shape
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(rows, k).to(dtype)
        x[-1, -1] = 7.5  # the last value of all decides its group's scale
        same(cuda.quantize(x, kind, group, symmetric), quant.quantize(x, kind, group, symmetric))
    assert calls == ["quantize"] * 3


def test_what_does_not_fit_is_refused_with_a_reason(calls):
    codes, scales, _ = quant.quantize(torch.randn(4, 64), 0, 0, True)
    fits = (torch.randn(2, 64), codes, scales, None, None, None, 0, 0, 0)
    assert linear.supports(*fits) is None
    many = (torch.randn(99, 64), *fits[1:])
    assert "99 tokens" in linear.supports(*many)
    assert "int8 activations" in linear.supports(*fits[:-1], 1)
    assert "multiples of 32" in cuda.misfit(codes, scales, 0, 0, 60)
    assert "16 bytes" in cuda.misfit(codes.t().contiguous().t(), scales, 0, 0, 64)
    assert "fp8_e4m3" in cuda.misfit(codes, scales, 4, 0, 64)
    supports, x = BACKENDS["quantize"].supports, torch.randn(4, 64)
    assert supports(x, 0, 0, True) is None
    assert "int8 in groups of -1" in supports(x, 0, -1, True)
    assert "mxfp8" in supports(x, 6, 32, True)
    assert "float64" in supports(x.double(), 0, 0, True)
    assert "multiples of 8" in supports(x[:, :60], 0, 0, True)
    assert "multiples of 8" in supports(x, 0, 12, True)
    assert "16 bytes" in supports(x.flatten()[1:57], 0, 0, True)
    assert "empty" in supports(x[:0], 0, 0, True)
