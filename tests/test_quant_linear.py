"""quant_linear beyond its CASES: Triton's kernels compiled for GPUs that need not be here."""

import itertools
import re
import sys

import pytest
import torch

import fastllm
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant.layout import E4M3, INT4, INT8, NF4
from fastllm.ops.quant_linear import quant_linear

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def packed(n, k, code=INT8, group=0, symmetric=True):
    """A weight and its codes."""
    weight = torch.randn(n, k) * k**-0.5
    codes, scales, zeros = quant.quantize(weight, code, group, symmetric)
    return codes, scales, None if symmetric else zeros


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3, 9, 70])
@pytest.mark.parametrize("code, group", [(INT8, 0), (INT4, 32), (NF4, 64), (E4M3, 0)])
def test_threads_and_strides_change_nothing(code, group, tokens, threads):
    """Codes that are a slice of a larger matrix, and any number of threads: the same bits."""
    codes, scales, _ = packed(100, 256, code, group)
    x = torch.randn(tokens, 256).bfloat16()
    wide = torch.zeros(100, codes.shape[1] + 13, dtype=torch.uint8)
    inner = wide[:, 5 : 5 + codes.shape[1]]
    inner.copy_(codes.view(torch.uint8))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = quant_linear(x, codes, scales, code=code, group=group, backend="cpu")
        torch.set_num_threads(threads)
        found = quant_linear(
            x, inner.view(codes.dtype), scales, code=code, group=group, backend="cpu"
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_token_that_is_not_finite_spoils_itself_only(tokens):
    codes, scales, _ = packed(40, 96)
    x = torch.randn(tokens + 1, 96)
    x[0, 7] = float("inf")
    for mode in ("dynamic", "static"):
        given = torch.tensor(0.02) if mode == "static" else None
        y = quant_linear(
            x, codes, scales, code=INT8, group=0, activations=mode, act_scale=given, backend="cpu"
        )
        assert y[0].isnan().all() and y[1:].isfinite().all()


def test_int8_products_are_exact():
    """No saturation: every code and every activation at its largest."""
    k = 4096
    codes = torch.full((24, k), 127, dtype=torch.int8)
    codes[1::2] = -127
    scales = torch.ones(24, 1)
    for tokens in (1, 7, 40):
        x = torch.ones(tokens, k)
        y = quant_linear(x, codes, scales, code=INT8, group=0, activations="dynamic", backend="cpu")
        wanted = codes.double().sum(1).float().expand(tokens, -1)
        assert torch.equal((y * 1.0).round(), wanted)


def test_autocast_lowers_the_activations():
    codes, scales, _ = packed(40, 64)
    x, b = torch.randn(5, 64), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        y = quant_linear(x, codes, scales, None, b, code=INT8, group=0)
    assert y.dtype == BF16
    wanted = quant_linear(x.bfloat16(), codes, scales, None, b.bfloat16(), code=INT8, group=0)
    assert torch.equal(y, wanted)


def test_errors_name_the_argument():
    codes, scales, _ = packed(8, 64)
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match="bias"):
        quant_linear(x, codes, scales, None, torch.zeros(9), code=INT8, group=0)
    with pytest.raises(ValueError, match="act_scale"):
        quant_linear(x, codes, scales, code=INT8, group=0, activations="static")
    with pytest.raises(ValueError, match="activations"):
        quant_linear(x, codes, scales, code=INT8, group=0, activations="rounded")
    with pytest.raises(ValueError, match=r"activation: expected one of gelu.*found 'tanh'"):
        quant_linear(x, codes, scales, code=INT8, group=0, activation="tanh")
    with pytest.raises(ValueError, match="k: expected"):
        quant_linear(x[:, :5], codes, scales, code=INT8, group=0)
    narrow, own, _ = packed(8, 60, INT8, 20)
    with pytest.raises(fastllm.UnsupportedError, match="groups of 20"):
        quant_linear(x[:, :60], narrow, own, code=INT8, group=20, backend="cpu")


# ---- Triton, ahead of time


def test_a_measured_cut_is_taken(monkeypatch):
    from types import SimpleNamespace

    from fastllm.kernels.quant_matmul import QuantConfig

    from fastllm.ops.quant_linear import triton_cuts

    known, asked = QuantConfig(16, 32, 64), []

    def measured(device, *sizes):
        asked.append(sizes)
        return vars(known)

    monkeypatch.setattr(triton_cuts, "CUTS", measured)
    x = torch.empty(2, 64, dtype=torch.int8)
    assert triton_cuts.pick(x, 48, INT8, 0, BF16) is None and not asked  # nothing to measure on
    on_gpu = SimpleNamespace(is_cuda=True, device="cuda:0", shape=x.shape, dtype=x.dtype)
    assert triton_cuts.pick(on_gpu, 48, INT8, 0, BF16) == known
    assert asked == [(2, 64, 48, INT8, 0, True, BF16)]


def launches(tokens, code, group, integer, dtype):
    """What the launchers would launch for a layer of 4096 x 4096."""
    from fastllm.kernels import quant_matmul as qm
    from fastllm.kernels.aot import meta, record

    n = k = 4096
    two = code in (INT4, NF4)
    codes = meta(n, k // 2 if two else k, dtype=torch.int8 if code == INT8 else torch.uint8)
    groups = k // group if group else 1
    scales = meta(n, groups, dtype=BF16 if code == INT4 else FP32)
    table = meta(16, dtype=FP32) if code == NF4 else None
    x, token_scales, bias = meta(tokens, k, dtype=dtype), None, meta(n, dtype=dtype)
    if integer:
        yield from record(qm.quantize_tokens, x)
        x, token_scales = meta(tokens, k, dtype=torch.int8), meta(tokens, dtype=FP32)
    named = {"table": table, "token_scales": token_scales, "dtype": dtype}
    named["activation"] = "gelu" if integer else "silu" if two else None
    zeros = scales if code == INT4 and tokens == 64 else None
    yield from record(qm.quant_matmul, x, codes, scales, zeros, bias, code, group, k, **named)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_compile_everywhere(request):
    from fastllm.kernels import aot
    from test_triton_compile import TARGETS, ptxas_report
    from triton.backends.compiler import GPUTarget

    forms = [(INT8, 0, False), (INT8, 0, True), (INT4, 32, False), (INT4, 128, True)]
    forms += [(NF4, 64, False), (E4M3, 0, False)]
    tokens = (1, 16, 64, 2048)
    if request.config.getoption("--exhaustive"):
        pairs = list(itertools.product(forms, tokens))
    else:
        pairs = [(form, tokens[i % 4]) for i, form in enumerate(forms)]
    seen = 0
    for target, limit in TARGETS.items():
        done = set()
        for (code, group, integer), m in pairs:
            for launch in launches(m, code, group, integer, BF16):
                if launch in done:
                    continue
                done.add(launch)
                kernel = aot.compile(launch, GPUTarget(*target))
                assert kernel.metadata.shared <= limit, f"{launch} on {target}"
                if target[0] == "cuda":
                    spills = ptxas_report(kernel.asm["ptx"], target[1])[1]
                else:
                    found = re.search(r"\.vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"])
                    spills = int(found[1])
                assert not spills, f"{launch} on {target}: {spills}"
                seen += 1
    assert seen >= 24
