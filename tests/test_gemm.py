"""The packed GEMM at every level of this machine: shapes, layouts, epilogues, packs, threads."""

import copy
import itertools

import pytest
import torch

from fastllm import _C
from fastllm.core.memory import empty
from fastllm.core.op import OPS
from fastllm.core.proof import compare, standard
from fastllm.functional import gated_linear, linear, matmul
from fastllm.ops.matmul import cpu, packed, prepack, products, unpack
from fastllm.ops.matmul.reference import activate
from fastllm.ops.matmul.spec import ACTIVATIONS

LEVELS = _C.isa_levels()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("linear", "linear_pre", "gated_linear", "gated_linear_pre", "matmul")
CASES = [
    (name, case)
    for name in NAMES
    for case in OPS[name].cases
    if "bench" not in case.tags and case.dtype in DTYPES
]
# thin, one block, several blocks, split k, empty k
SHAPES = (
    (1, 70, 33), (3, 50, 129), (5, 8, 0), (17, 5, 3), (33, 65, 64), (130, 31, 40), (64, 48, 300),
    (140, 300, 700), (20, 30, 9000),
)  # fmt: skip


@pytest.fixture(params=LEVELS)
def level(request):
    """Runs the test at this level and proves afterwards that it did."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    assert _C.isa() == request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """One thread, and outputs that start as NaN: what a kernel does not write is seen."""
    torch.set_num_threads(1)

    def poison(shape, dtype):
        return empty(shape, dtype).fill_(float("nan"))

    monkeypatch.setattr(products, "empty", poison)
    monkeypatch.setattr(cpu, "empty", poison)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c.name}" for n, c in CASES])
def test_cases_keep_the_budget(name, case):
    before, held = _C.isa(), standard(OPS[name], case)
    try:
        for level in LEVELS:
            _C.set_isa(level)
            proof = held.prove("cpu")
            assert proof.ok, f"{level}: {proof.message}"
    finally:
        _C.set_isa(before)


def matrix(rows, cols, dtype, layout):
    """A matrix as its rows lie, transposed, or with gaps both ways."""
    if layout == "transposed":
        return torch.randn(cols, rows).to(dtype).t()
    if layout == "gaps":
        return torch.randn(rows, 2 * cols + 1).to(dtype)[:, 1::2]
    return torch.randn(rows, cols).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_transposition(level, dtype):
    layouts = ("rows", "transposed", "gaps")
    for (m, n, k), (left, right) in itertools.product(SHAPES, itertools.product(layouts, layouts)):
        if "gaps" in (left, right) and k > 100:
            continue
        a, b = matrix(m, k, dtype, left), matrix(n, k, dtype, right)
        proof = compare("product", products.cpu(a, b), a @ b.t(), a.double() @ b.double().t())
        assert proof.ok, ((m, n, k), left, right, proof.message)


def test_every_height_of_a_panel(level):
    for m in range(1, 36):
        a, b = torch.randn(m, 40), torch.randn(37, 40)
        exact = a.double() @ b.double().t()
        assert (products.cpu(a, b) - exact).abs().max() < 4e-5, m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epilogues_round_once(level, dtype):
    """bias, activation and residual in fp32 after the sums: at most half a unit off, and a bit."""
    for m, activation in itertools.product((2, 20, 150), (None, *ACTIVATIONS)):
        x, w = torch.randn(m, 64).to(dtype), (torch.randn(72, 64) / 8).to(dtype)
        b, r = torch.randn(72).to(dtype), torch.randn(m, 72).to(dtype)
        exact = x.double() @ w.double().t() + b.double()
        exact = activate(exact, activation) + r.double()
        found = products.cpu(x, w, b, activation, r).double()
        size = exact.abs().clamp(min=1)
        allowed = (0.51 * torch.finfo(dtype).eps + 1e-5) * size
        assert ((found - exact).abs() <= allowed).all(), (m, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulates_in_float32(level, dtype):
    """What gradient accumulation into a main_grad needs: sums are never rounded to 16 bits."""
    for m, n, k in ((3, 40, 50), (30, 40, 50), (200, 90, 70)):
        total = torch.randn(m, n)
        exact = total.double()
        for _ in range(4):
            a, b = torch.randn(k, m).to(dtype).t(), torch.randn(k, n).to(dtype).t()
            products.cpu(a, b, out=total, accumulate=True)
            exact += a.double() @ b.double().t()
        assert (total - exact).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(level, dtype):
    for m, n, k in ((1, 500, 300), (4, 130, 1000), (20, 30, 9000), (300, 200, 600)):
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        found = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(products.cpu(a, b).float())
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]), (m, n, k)


def test_nothing_is_written_past_the_end(level):
    for m, n, dtype in itertools.product((1, 4, 15, 130), (1, 15, 33, 130), DTYPES):
        room = torch.full((m * n + 128,), 7.0, dtype=dtype)
        out = room[64 : 64 + m * n].view(m, n)
        products.cpu(torch.randn(m, 9).to(dtype), torch.randn(n, 9).to(dtype), out=out)
        assert (room[:64] == 7).all() and (room[-64:] == 7).all(), (m, n, dtype)


def test_hostile_values_reach_what_they_touch_and_nothing_else(level):
    for dtype in DTYPES:
        x, w = torch.randn(20, 33).to(dtype), torch.randn(40, 33).to(dtype)
        x[3, 5], x[7, 32], w[11, 0] = float("inf"), float("nan"), float("-inf")
        found, expected = products.cpu(x, w), (x.double() @ w.double().t()).to(dtype)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


# ---- packed weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pack_is_the_weight(level, dtype):
    for m, n, k in ((5, 33, 40), (40, 70, 300), (200, 130, 129)):
        x, w, up = (torch.randn(rows, k).to(dtype) for rows in (m, n, n))
        plain = linear(x, w, backend="cpu"), gated_linear(x, w, up, backend="cpu")
        prepack(w)
        prepack(up)
        assert packed.pointer(w) and products.choose(x, w) == "cpu"
        assert torch.equal(linear(x, w), plain[0]) and torch.equal(gated_linear(x, w, up), plain[1])


def test_a_stale_pack_is_made_again():
    x, layer = torch.randn(40, 64), torch.nn.Linear(64, 48, bias=False)
    w = layer.weight
    prepack(w)

    def right():
        assert packed.pointer(w)
        exact = torch.nn.functional.linear(x.to(w.dtype).double(), w.double())
        return (linear(x.to(w.dtype), w) - exact).abs().max() < 0.02

    assert right()
    with torch.no_grad():
        w.mul_(3)
    assert right()
    layer.load_state_dict({"weight": torch.randn(48, 64) / 16})
    assert right()
    layer.to(torch.bfloat16)
    assert right()
    before = _C.isa()
    for level in LEVELS:
        _C.set_isa(level)
        assert right(), level
    _C.set_isa(before)
    assert set(layer.state_dict()) == {"weight"} and packed.pointer(copy.deepcopy(w)) == 0
    unpack(w)
    assert packed.pointer(w) == 0


def test_a_pack_dies_with_its_weight():
    w = torch.randn(8, 8)
    key = id(w)
    prepack(w)
    assert key in packed.PACKS
    del w
    assert key not in packed.PACKS


def test_what_cannot_be_packed_is_refused():
    with torch.inference_mode():
        inference = torch.randn(8, 8)
    for wrong in (inference, torch.randn(8, 8).t()[:, 1:], torch.randn(8), torch.randn(8, 8).int()):
        with pytest.raises(ValueError, match="weight: expected a contiguous CPU matrix"):
            prepack(wrong)


# ---- the public functions


def test_products_of_all_three_libraries_agree():
    x, w, b = torch.randn(64, 96), torch.randn(80, 96), torch.randn(80)
    for activation in (None, *ACTIVATIONS):
        ours = linear(x, w, b, activation=activation, backend="cpu")
        stock = linear(x, w, b, activation=activation, backend="torch")
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        if products.onednn_missing(torch.float32) is None:
            other = linear(x, w, b, activation=activation, backend="onednn")
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_training_keeps_the_pre_activation_and_agrees_with_stock():
    for make in (
        lambda x, w, v, **k: linear(x, w, activation="silu", **k),
        lambda x, w, v, **k: gated_linear(x, w, v, **k),
        lambda x, w, v, **k: matmul(x, w.t(), **k),
    ):
        leaves = [torch.randn(s, 48).requires_grad_() for s in (30, 40, 40)]
        upstream = torch.randn(30, 40)
        results = []
        for backend in (None, "cpu", "torch"):
            out = make(*leaves, backend=backend)
            wanted = [t for t in leaves if make(*leaves, backend="torch").requires_grad]
            results.append((out, *torch.autograd.grad(out, wanted, upstream, allow_unused=True)))
        for found in results[:2]:
            for a, b in zip(found, results[2], strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast_is_torchs():
    x, w, b = torch.randn(6, 8), torch.randn(4, 8, requires_grad=True), torch.randn(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, stock = (
            linear(x, w, b, activation="relu"),
            torch.relu(torch.nn.functional.linear(x, w, b)),
        )
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    ours.float().sum().backward()
    assert w.grad.dtype == torch.float32


def test_compiles_whole():
    x, w, v = (torch.randn(s, 24, requires_grad=True) for s in (10, 20, 20))

    def block(x, w, v):
        return linear(gated_linear(x, w, v), torch.ones(6, 20), activation="gelu")

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, v), block(x, w, v))
    first = torch.autograd.grad(compiled(x, w, v).sum(), (x, w, v))
    for a, b in zip(first, torch.autograd.grad(block(x, w, v).sum(), (x, w, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: linear(x, x[:, :3]), r"weight: expected shape \[N, 8\]"),
        (lambda x: linear(x, x, x[0]), r"bias: expected shape \[4\], found \[8\]"),
        (lambda x: linear(x, x, activation="tanh"), "activation: expected one of gelu"),
        (lambda x: linear(x, x.double()), "weight: expected the dtype and device of input"),
        (lambda x: linear(x, x, residual=x), r"residual: expected shape \[4, 4\]"),
        (lambda x: gated_linear(x, x, x[:2]), r"weight_up: expected shape \[4, 8\]"),
        (lambda x: matmul(x, x), "other: expected inner size 8"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(4, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_equal_to_the_bit(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(301, 257).to(dtype), torch.randn(403, 257).to(dtype)
    whole = products.cpu(a, b, block=products.BLOCKS[0])
    for block in (1, *products.BLOCKS[1:], 10**6):
        assert torch.equal(products.cpu(a, b, block=block), whole)
