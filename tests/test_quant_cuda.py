"""The kernels on codes in CUDA C++, run by the emulator of tests/cuda_on_cpu: kernels and what
Python does around them are those of a GPU; the tensors are on the CPU."""

import ctypes
import types

import pytest
import torch
from test_cuda import emulated

from fastllm.core.proof import compare
from fastllm.ops.quant import cuda, dequantize_op
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant_linear import cuda as linear
from fastllm.ops.quant_linear import quant_linear_op, reference, stock

INT, LONG, PLACE = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
WEIGHT = [INT, PLACE, LONG, LONG, LONG, PLACE, PLACE, INT, LONG, LONG, PLACE]
ARGUMENTS = {
    "gemv": [INT, PLACE, LONG, LONG, *WEIGHT, PLACE, PLACE],
    "dequantize": [INT, *WEIGHT, PLACE],
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

    fake = types.SimpleNamespace(quant_gemv=call("gemv"), quant_dequantize=call("dequantize"))
    for module in (cuda, linear):
        monkeypatch.setattr(module, "_cuda", fake)
    monkeypatch.setattr(cuda, "DEVICES", ("cpu",))
    return made


BACKENDS = {"dequantize": cuda.BACKENDS["dequantize"], "quant_linear": linear.BACKEND}


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
