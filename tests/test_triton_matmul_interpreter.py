"""What the heuristics of the matrix products reach only with large sizes or on a GPU: every kind of
config, in Triton's interpreter. A process of its own, started by the first test here."""

import itertools
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F

HERE = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not HERE, reason="runs in the process with TRITON_INTERPRET=1")

FP32, FP16 = torch.float32, torch.float16
KINDS = ("tile", "split", "persistent", "tma", "tma-persistent")
# (M, K, N), the layouts of A and B: "t" is a transposed view
PRODUCTS = [
    ((33, 48, 40), "nt", FP32),
    ((64, 50, 33), "tn", FP16),
    ((1, 16, 16), "tt", FP16),
    ((5, 0, 7), "nn", FP32),
    ((48, 72, 64), "nn", FP16),
    ((40, 72, 64), "tt", FP16),
]
EPILOGUES = [
    (None, False, False),
    ("gelu", True, True),
    ("gelu_tanh", True, False),
    ("silu", False, True),
    ("relu", True, True),
    ("relu2", True, False),
]
ACTIVATIONS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


@pytest.mark.skipif(HERE, reason="this is that process")
def test_products_in_the_interpreter():
    """Runs the rest of this file with the interpreter on."""
    triton = tuple(map(int, version("triton").split(".")[:2]))
    numpy = tuple(map(int, version("numpy").split(".")[:2]))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a tensor's value on NumPy 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 30, done.stdout[-2000:]


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so that what no program writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def config(kind, **changes):
    from fastllm.kernels.tiles import Config

    facts = {"block_m": 16, "block_n": 32, "block_k": 16, "stages": 2, "group_m": 2}
    facts |= {"split_k": 3 if kind == "split" else 1}
    facts |= {"tma": "tma" in kind, "persistent": "persistent" in kind}
    return Config(**(facts | changes))


def operands(size, layout, dtype):
    m, k, n = size
    a = torch.randn(k, m).t() if layout[0] == "t" else torch.randn(m, k)
    b = torch.randn(n, k).t() if layout[1] == "t" else torch.randn(k, n)
    return _cast(a, dtype), _cast(b, dtype)


def _cast(x, dtype):
    return x.to(dtype, memory_format=torch.preserve_format)


def close(value, exact):
    assert value.shape == exact.shape
    size = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    error = (value.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= 4 * torch.finfo(value.dtype).eps * size, error


@inside
@pytest.mark.parametrize("size, layout, dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_epilogues(kind, size, layout, dtype):
    from fastllm.kernels.matmul import matmul

    a, b = operands(size, layout, dtype)
    product = a.double() @ b.double()
    bias, residual = torch.randn(size[2]).to(dtype), torch.randn(size[0], size[2]).to(dtype)
    place = KINDS.index(kind) + PRODUCTS.index((size, layout, dtype))
    for activation, with_bias, with_residual in (EPILOGUES * 2)[place % 6 : place % 6 + 2]:
        z = 0.5 * product + (bias.double() if with_bias else 0.0)
        y = ACTIVATIONS[activation](z) + (residual.double() if with_residual else 0.0)
        c, pre = matmul(
            a, b, bias if with_bias else None, residual if with_residual else None,
            activation=activation, scale=0.5, preactivation=True, config=config(kind),
        )  # fmt: skip
        assert c.dtype == pre.dtype == dtype
        close(c, y)
        close(pre, z)


@inside
@pytest.mark.parametrize("kind", KINDS)
def test_accumulating_into_fp32(kind):
    """As a main_grad does: fp16 operands, an fp32 buffer that keeps its address."""
    from fastllm.kernels.matmul import matmul

    a, b = operands((40, 64, 48), "tn", FP16)
    out = torch.randn(40, 48)
    before = out.clone()
    c, pre = matmul(a, b, out=out, accumulate=True, config=config(kind))
    assert c is out and pre is None
    close(out, before.double() + a.double() @ b.double())


@inside
def test_linear_adds_its_gradient_to_a_main_grad():
    from fastllm import functional

    x, w = torch.randn(3, 17, 24).half(), torch.randn(40, 24).half().requires_grad_()
    total, dy = torch.randn(40, 24), torch.randn(3, 17, 40).half()
    before, version = total.clone(), total._version
    functional.linear_main_grad(x, w, main_grad=total, backend="triton").backward(dy)
    close(total, before.double() + dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1))
    assert w.grad is None and total._version > version


@inside
@pytest.mark.parametrize("kind", ["tile", "persistent", "tma"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[1:])
def test_gated_pairs(kind, activation):
    from fastllm.kernels.matmul import gated_matmul

    a, b = operands((40, 64, 48), "nt", FP16)
    b2 = operands((40, 64, 48), "nt" if kind != "tile" else "nn", FP16)[1]
    gate, up = a.double() @ b.double(), a.double() @ b2.double()
    c, pre, pre2 = gated_matmul(
        a, b, b2, activation=activation, preactivation=True, config=config(kind)
    )
    close(c, ACTIVATIONS[activation](gate) * up)
    close(pre, gate)
    close(pre2, up)


@inside
def test_split_k_is_deterministic():
    from fastllm.kernels.matmul import matmul

    a, b = operands((17, 300, 20), "nn", FP32)
    first, again = (matmul(a, b, config=config("split"))[0] for _ in range(2))
    assert torch.equal(first, again)


# rows of each expert, rows of none; the grid is smaller than the number of tiles
SHARES = [((40, 0, 1, 33), 0), ((0, 0, 50), 7), ((16,), 0), ((0, 0), 20), ((1,) * 9, 2)]


@inside
@pytest.mark.parametrize("counts, rest", SHARES, ids=str)
@pytest.mark.parametrize("kind, dtype", [("tile", FP32), ("tma", FP16)], ids=str)
def test_experts(counts, rest, kind, dtype):
    from fastllm.kernels import grouped_matmul as grouped

    from fastllm.core.op import OPS

    tokens, inner, outputs, experts = sum(counts) + rest, 40, 72, len(counts)
    x, dy = torch.randn(tokens, inner).to(dtype), torch.randn(tokens, outputs).to(dtype)
    w = torch.randn(experts, outputs, inner).to(dtype)
    b = torch.randn(experts, outputs).to(dtype)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    op, exact = OPS["grouped_linear"], [t.double() for t in (x, w, dy, b)]
    how = {"config": config(kind)}
    close(
        grouped.grouped_matmul(x, w.mT, ends, b, **how),
        op.reference(exact[0], exact[1], ends, exact[3]),
    )
    dx, dw, db = op.reference_backward(exact[2], exact[0], exact[1], ends, exact[3], (True,) * 3)
    close(grouped.grouped_matmul(dy, w, ends, **how), dx)
    close(grouped.grouped_weight_grad(dy, x, ends, experts, **how), dw)
    close(grouped.grouped_bias_grad(dy, ends, experts), db)
    main = torch.ones(experts, outputs, inner)
    grouped.grouped_weight_grad(dy, x, ends, experts, out=main, accumulate=True, **how)
    close(main, dw + 1.0)


@inside
def test_offsets_that_make_no_sense_stay_inside():
    """They cannot be reported without waiting for the GPU; what is computed lies in bounds."""
    from fastllm.kernels.grouped_matmul import grouped_matmul, grouped_weight_grad

    x, w = torch.randn(20, 16), torch.randn(3, 16, 8)
    for ends in itertools.permutations((-5, 12, 99)):
        ends = torch.tensor(ends, dtype=torch.int32)
        assert grouped_matmul(x, w, ends).isfinite().all()
        assert grouped_weight_grad(x, x, ends, 3).isfinite().all()


@inside
def test_batches():
    from fastllm.kernels.matmul import batched_matmul

    a, b = torch.randn(3, 20, 17), torch.randn(1, 17, 9).expand(3, 17, 9)
    close(batched_matmul(a, b, config=config("tile")), a.double() @ b.double())


@inside
@pytest.mark.parametrize("products, plain", [(1, True), (1, False), (2, False)])
def test_what_the_tuner_would_measure(products, plain):
    from fastllm.ops.matmul.triton_tiles import TILES

    sizes = (24, 40, 48, True, False, torch.float32, products, plain, False)
    a, *rights = TILES.build(torch.device("cpu"), *sizes)[: 1 + products]
    exact = [a.double() @ b.double() for b in rights]
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    exact = silu(exact[0]) * exact[1] if products == 2 else exact[0] if plain else gelu(exact[0])
    found = TILES.candidates("cpu", sizes)
    assert TILES.default(*sizes) in found.values() and len(found) > 3
    for chosen in list(found.values())[:3]:
        close(TILES.run(chosen, a, *rights, plain, False)[0], exact)


@inside
@pytest.mark.parametrize("code, group, integer", [(0, 0, False), (0, 0, True), (1, 32, False)])
def test_quantized_products_that_the_tuner_would_measure(code, group, integer):
    from fastllm.ops.quant_linear import reference
    from fastllm.ops.quant_linear.triton_cuts import CUTS

    sizes = (5, 128, 40, code, group, integer, torch.float32)
    x, codes, scales, token_scales, *rest = CUTS.build(torch.device("cpu"), *sizes)
    w = reference.weight(codes, scales, None, code, group, 128, torch.float64)
    exact = x.double() @ w.t()
    exact = exact * token_scales[:, None] if integer else exact
    found = CUTS.candidates("cpu", sizes)
    assert CUTS.default(*sizes) in found.values() and len(found) > 3
    for chosen in list(found.values())[:3]:
        close(CUTS.run(chosen, x, codes, scales, token_scales, *rest), exact)
