"""The multi-tensor step in CUDA C++, run by the emulator of tests/cuda_on_cpu: tables, kernels and
what Python does around them are those of a GPU; the tensors are on the CPU."""

import ctypes
import types

import pytest
import torch
from test_cuda import emulated
from torch.nn import Parameter

import fastllm
from fastllm import optim
from fastllm.core.proof import compare
from fastllm.optim import cuda, states

SHAPES = ((30, 10), (7,), (), (0, 3), (65, 66), (17_000,))
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

MAKERS = [
    (optim.AdamW, {}),
    (optim.AdamW, {"amsgrad": True, "maximize": True, "lr": 0.1, "eps": 1e-3}),
    (optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optim.Lion, {"weight_decay": 0.1}),
    (optim.LAMB, {"lr": 0.01}),
    (optim.LAMB, {"weight_decay": 0.0, "maximize": True}),
    (optim.Adafactor, {}),
    (optim.Adafactor, {"lr": 0.1, "weight_decay": 0.1, "d": 1.5, "eps": (1e-3, 1e-2)}),
    (optim.Adafactor, {"maximize": True, "beta2_decay": -0.5}),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return emulated("optim", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def factored(tmp_path_factory):
    return emulated("adafactor", tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def calls(library, factored, monkeypatch):
    """fastllm._cuda by the emulator, for tensors on the CPU; counts the steps."""
    made = []

    def optim_step(
        kind, rows, shares, row_count, share_count, uses, squares, scale, found, norm, max_norm,
        settings, counts, device, stream,
    ):  # fmt: skip
        made.append(share_count)
        pointers = [ctypes.c_void_p(x) for x in (uses, squares, scale, found, norm)]
        error = library.emulate_optim_step(
            kind, ctypes.c_void_p(rows), ctypes.c_void_p(shares), ctypes.c_int64(row_count),
            ctypes.c_int64(share_count), *pointers, ctypes.c_float(max_norm), settings,
            ctypes.c_int64(len(settings) // 64), counts,
        )  # fmt: skip
        assert error == 0

    def adafactor(rows, shares, moments, *rest):
        made.append(rest[1])
        counts, pointers, numbers = rest[:3], rest[3:10], rest[10:14]
        error = factored.emulate_adafactor(
            *map(ctypes.c_void_p, (rows, shares, moments)), *map(ctypes.c_int64, counts),
            *map(ctypes.c_void_p, pointers), *map(ctypes.c_double, numbers),
            ctypes.c_float(rest[14]),
        )  # fmt: skip
        assert error == 0

    found = types.SimpleNamespace(optim_step=optim_step, adafactor=adafactor)
    monkeypatch.setattr(cuda, "_cuda", found)
    monkeypatch.setattr(cuda, "available", lambda: None)
    monkeypatch.setitem(cuda.KINDS, "cpu", 1)
    return made


def parameters(dtype=FP32, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def train(optimizer, params, backend, steps=3, dtype=None, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    with fastllm.backend(backend):
        for _ in range(steps):
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=generator).mul(scale).to(dtype or p.dtype)
                p.grad = None if i == 1 else g
            optimizer.step()
    assert optimizer.backend_used == backend
    return [p.detach().clone() for p in params]


def values(optimizer):
    return [v for s in optimizer.state.values() for v in s.values()]


@pytest.mark.parametrize("cls, options", MAKERS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("clip", [None, 0.5])
def test_as_the_reference(calls, cls, options, clip):
    a, b, c = parameters(), parameters(), parameters(torch.float64)
    options = options | {"max_grad_norm": clip}
    made, right = train(cls(a, **options), a, "cuda"), train(cls(b, **options), b, "reference")
    exact = train(cls(c, **options), c, "reference")
    assert len(calls) == (6 if cls in (optim.LAMB, optim.Adafactor) else 3)
    for i, (x, y, z) in enumerate(zip(made, right, exact, strict=True)):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
        if cls is not optim.Lion:  # a sign may turn where the momentum is within rounding of zero
            proof = compare(f"parameter {i}", x, y, z)
            assert proof.ok, proof.message


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"max_grad_norm": 0.5, "weight_decay": 0.5}, FP32),
        ({"nesterov": False, "momentum": 0.8, "master_weights": True}, BF16),
        ({"adjust_lr_fn": "match_rms_adamw", "stochastic_rounding": True}, BF16),
    ],
    ids=str,
)
def test_muon_as_the_reference(calls, options, dtype):
    """Momentum in one launch, orthogonal matrices by torch's products, the step in another one."""
    shapes = ((30, 50), (50, 30), (64, 64), (0, 3), (1, 9))
    start = parameters(dtype, shapes)
    a, b = parameters(dtype, shapes), parameters(dtype, shapes)
    a[1].data = a[1].data.t().contiguous().t()  # lies by columns
    ours, plain = optim.Muon(a, lr=0.1, **options), optim.Muon(b, lr=0.1, **options)
    made, right = train(ours, a, "cuda"), train(plain, b, "reference")
    assert len(calls) == 6
    low = 0 if dtype == FP32 or options.get("master_weights") else 2e-3
    for i, (x, y, p) in enumerate(zip(made, right, start, strict=True)):
        step = (y.float() - p.float()).norm()
        assert (x.float() - y.float()).norm() <= 0.03 * step + low * p.float().norm()
        assert (step > 0) == (i not in (1, 3))
    for x, y in zip(values(ours), values(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6 if x.dtype == FP32 else 0.02)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("grad", [None, FP32])
@pytest.mark.parametrize("master", [False, True])
def test_low_precision(calls, dtype, grad, master):
    a, b = parameters(dtype), parameters(dtype)
    if grad is not None:
        for p in (*a, *b):
            p.grad_dtype = grad
    options = {"lr": 0.01, "master_weights": master}
    made = train(optim.AdamW(a, **options), a, "cuda", dtype=grad)
    right = train(optim.AdamW(b, **options), b, "reference", dtype=grad)
    for x, y in zip(made, right, strict=True):
        assert (x != y).float().mean() < 0.01 if x.numel() else True


@pytest.mark.parametrize("kept", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion, optim.LAMB])
def test_small_states_are_the_references(calls, kept, cls):
    """The codes, scales and random numbers are those of plain torch, short last blocks too."""
    options = {"state_dtype": kept, "lr": 0.01} | ({"momentum": 0.9} if cls is optim.SGD else {})
    a, b = parameters(), parameters()
    ours, plain = cls(a, **options), cls(b, **options)
    made, right = train(ours, a, "cuda"), train(plain, b, "reference")
    for x, y in zip(made, right, strict=True):
        assert (x - y).abs().mean() < 1e-5 if x.numel() else True
    for x, y in zip(values(ours), values(plain), strict=True):
        if x.dtype.itemsize == 1:
            assert (x.view(torch.uint8) != y.view(torch.uint8)).float().mean() < 0.002
        else:
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB, optim.Adafactor])
def test_stochastic_rounding_is_the_references(calls, cls):
    a, b = parameters(BF16), parameters(BF16)
    options = {"stochastic_rounding": True, "lr": 1e-3, "seed": 5}
    made = train(cls(a, **options), a, "cuda")
    right = train(cls(b, **options), b, "reference")
    for x, y in zip(made, right, strict=True):
        assert (x != y).float().mean() < 0.01 if x.numel() else True
    if cls is not optim.AdamW:
        return
    still = parameters(BF16)
    nearest = train(optim.AdamW(still, lr=1e-3), still, "cuda")
    assert (made[-1] != nearest[-1]).float().mean() > 0.1


def test_scale_and_found_inf_stay_on_the_device(calls):
    """A skipped step leaves parameters, moments and steps alone; a scaled one is unscaled."""
    a, b = parameters(), parameters()
    ours, plain = optim.AdamW(a, max_grad_norm=0.5), optim.AdamW(b, max_grad_norm=0.5)
    for step in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = q.grad * 8
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(step in (0, 2)))
        if step in (0, 2):
            a[0].grad.view(-1)[3] = float("inf")
        before = [t.detach().clone() for t in (*a, *values(ours))]
        with fastllm.backend("cuda"):
            ours.step()
        if step == 2:
            after = [t.detach() for t in (*a, *values(ours))]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        if step in (1, 3):
            with fastllm.backend("reference"):
                plain.step()
            assert float(ours.grad_norm) == pytest.approx(plain.grad_norm, rel=1e-5)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert {s["step"].item() for s in ours.state.values()} == {2.0}


def test_adafactor_skips_and_takes_other_layouts(calls):
    """A step with inf changes nothing; stacks of matrices, many rows, and those by columns."""
    torch.manual_seed(0)
    shapes = ((3, 20, 40), (17, 300), (40,), (4500, 3))
    a = [Parameter(torch.randn(s)) for s in shapes] + [Parameter(torch.randn(30, 50).t())]
    b = [Parameter(p.detach().clone()) for p in a]
    ours, plain = optim.Adafactor(a, lr=0.1), optim.Adafactor(b, lr=0.1)
    for step in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = torch.empty_like(p).copy_(q.grad) * 8
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(step in (0, 2)))
        if step in (0, 2):
            a[0].grad.view(-1)[3] = float("inf")
        before = [t.detach().clone() for t in (*a, *values(ours))]
        with fastllm.backend("cuda"):
            ours.step()
        if step == 2:
            after = [t.detach() for t in (*a, *values(ours))]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        elif step != 0:
            with fastllm.backend("reference"):
                plain.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    for x, y in zip(values(ours), values(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_tables_are_kept_and_dropped_rightly(calls, monkeypatch):
    """The same memory has one table; a tensor elsewhere, or of another dtype there, a new one."""
    monkeypatch.setattr(cuda, "_tables", {})
    made = []
    whole = cuda.Table.__init__
    monkeypatch.setattr(
        cuda.Table, "__init__", lambda self, *args: (made.append(1), whole(self, *args))[1]
    )
    a, b = parameters(shapes=((300,), (50, 9))), parameters(shapes=((300,), (50, 9)))
    ours, plain = optim.AdamW(a, lr=0.1), optim.AdamW(b, lr=0.1)

    def step(count):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape) if p.grad is None else p.grad.normal_()
            q.grad = p.grad.clone()
        with fastllm.backend("cuda"):
            ours.step()
        with fastllm.backend("reference"):
            plain.step()
        assert len(made) == count
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)

    step(1)
    ours.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.05  # not in the table
    step(1)
    keep = a[0].data
    a[0].data = keep.clone()
    step(2)
    state = ours.state[a[1]]
    old = state["exp_avg"]
    state["exp_avg"] = old.clone()
    step(3)
    held, a[0].grad = a[0].grad, None
    step(4)
    assert held is not a[0].grad


def test_groups_are_more_than_a_launch_has(calls):
    """Settings of 32 groups go with a launch; each parameter gets its own group's."""
    a, b = parameters(shapes=[(20,)] * 70), parameters(shapes=[(20,)] * 70)
    made = [
        cls([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)])
        for cls, params in ((optim.AdamW, a), (optim.AdamW, b))
    ]
    for x, y in zip(train(made[0], a, "cuda"), train(made[1], b, "reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


def test_gradients_that_lie_differently(calls):
    torch.manual_seed(0)
    base = torch.randn(24, 40)
    for grad in (
        torch.randn(40, 24).t(),
        torch.randn(1, 40).expand(24, 40),
        torch.randn(24, 80)[:, ::2],
        torch._neg_view(torch.randn(24, 40)),
        torch.randn(961)[1:].view(24, 40),  # no multiple of 16 bytes
    ):
        p, q = Parameter(base.clone()), Parameter(base.clone())
        p.grad, q.grad = grad, grad.clone()
        with fastllm.backend("cuda"):
            optim.AdamW([p], lr=0.1).step()
        torch.optim.AdamW([q], lr=0.1).step()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-40, 1e30])
def test_hostile_gradients(calls, value):
    """What is not finite poisons its own block and no other; zeros stay zeros."""
    p = Parameter(torch.ones(4, 1024))
    optimizer = optim.AdamW([p], state_dtype="int8", lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(4, 1024)
    p.grad[1, 3] = value
    with fastllm.backend("cuda"):
        optimizer.step()
        optimizer.step()
    blocks = p.detach().view(-1, states.BLOCK)
    hit = 1024 // states.BLOCK
    assert (blocks[:hit] == 1).all() and (blocks[hit + 1 :] == 1).all()
    if value != value:
        assert p[1, 3].isnan()


def test_what_is_refused(calls):
    strided = Parameter(torch.randn(50, 2)[:, 0])
    strided.grad = torch.randn(50)
    wide = Parameter(torch.randn(5, dtype=torch.float64))
    wide.grad = torch.randn(5, dtype=torch.float64)
    for optimizer, why in (
        (optim.AdamW([strided]), "gaps"),
        (optim.AdamW([wide]), "dtypes"),
    ):
        with fastllm.backend("cuda"), pytest.raises(fastllm.UnsupportedError, match=why):
            optimizer.step()


def test_shards_are_not_clipped_on_their_own(calls, monkeypatch):
    """The norm of a DTensor's shard is not the whole one's: that step waits for the others."""
    monkeypatch.setattr("fastllm.optim.device.is_dtensor", lambda p: True)
    p = Parameter(torch.randn(50))
    p.grad = torch.randn(50)
    with fastllm.backend("cuda"):
        optim.AdamW([p]).step()
        with pytest.raises(fastllm.UnsupportedError, match="norm to clip to"):
            optim.AdamW([p], max_grad_norm=1.0).step()
    assert len(calls) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device():
    p = Parameter(torch.randn(50))
    p.grad = torch.randn(50)
    with fastllm.backend("cuda"), pytest.raises(fastllm.UnsupportedError, match="backend 'cuda'"):
        optim.AdamW([p]).step()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8", "fp8"])
def test_on_the_device(backend, kept):
    """What the device computes is what plain torch does, loss scale and clipping included."""
    options = {"state_dtype": kept, "lr": 0.01, "max_grad_norm": 0.5}
    a = [Parameter(p.detach().cuda()) for p in parameters()]
    b = parameters()
    ours, plain = optim.AdamW(a, **options), optim.AdamW(b, **options)
    for _ in range(3):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.cuda() * 8
        ours.grad_scale = torch.tensor(8.0, device="cuda")
        with fastllm.backend(backend):
            ours.step()
        with fastllm.backend("reference"):
            plain.step()
    assert ours.backend_used == backend
    for p, q in zip(a, b, strict=True):
        assert (p.cpu() - q).abs().mean() < 1e-5 if q.numel() else True
