"""The multi-tensor step in Triton: in the interpreter (a process of its own), and compiled for GPUs
that need not be here."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.nn import Parameter

import fastllm
from fastllm import optim

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux", allow_module_level=True)

HERE = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not HERE, reason="runs in the process with TRITON_INTERPRET=1")
SHAPES = ((30, 10), (7,), (), (0, 3), (33, 65), (17_000,))
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))

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


@pytest.mark.skipif(HERE, reason="this is that process")
def test_steps_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout[-2000:]


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def train(optimizer, params, backend, steps=3):
    generator = torch.Generator().manual_seed(1)
    with fastllm.backend(backend):
        for _ in range(steps):
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = None if i == 1 else g
            optimizer.step()
    assert optimizer.backend_used == backend
    return [p.detach().clone() for p in params]


@inside
@pytest.mark.parametrize("cls, options", MAKERS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("clip", [None, 0.5])
def test_as_the_reference(cls, options, clip):
    a, b = parameters(), parameters()
    made = train(cls(a, max_grad_norm=clip, **options), a, "triton")
    right = train(cls(b, max_grad_norm=clip, **options), b, "reference")
    for x, y in zip(made, right, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@inside
@pytest.mark.parametrize("master", [False, True])
def test_low_precision(master):
    a, b = parameters(torch.float16), parameters(torch.float16)
    made = train(optim.AdamW(a, lr=0.01, master_weights=master), a, "triton")
    right = train(optim.AdamW(b, lr=0.01, master_weights=master), b, "reference")
    for x, y in zip(made, right, strict=True):
        assert (x != y).float().mean() < 0.02 if x.numel() else True
        torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-3)


@inside
def test_scale_and_found_inf_stay_on_the_device():
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
        before = [t.detach().clone() for t in (*a, *all_states(ours))]
        with fastllm.backend("triton"):
            ours.step()
        if step == 2:
            after = [t.detach() for t in (*a, *all_states(ours))]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        if step in (1, 3):
            with fastllm.backend("reference"):
                plain.step()
            assert float(ours.grad_norm) == pytest.approx(plain.grad_norm, rel=1e-5)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)
    assert {s["step"].item() for s in ours.state.values()} == {2.0}


def all_states(optimizer):
    return [v for s in optimizer.state.values() for v in s.values()]


@inside
def test_adafactor_skips_and_takes_other_layouts():
    """A step with inf changes nothing; stacks of matrices, and those that lie by columns."""
    torch.manual_seed(0)
    shapes = ((3, 20, 40), (17, 300), (40,))
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
        before = [t.detach().clone() for t in (*a, *all_states(ours))]
        with fastllm.backend("triton"):
            ours.step()
        if step == 2:
            after = [t.detach() for t in (*a, *all_states(ours))]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        elif step != 0:
            with fastllm.backend("reference"):
                plain.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


@inside
def test_new_memory_is_seen():
    """Tables are kept by address: a gradient or parameter elsewhere is not mistaken."""
    a, b = parameters(), parameters()
    ours, plain = optim.AdamW(a), optim.AdamW(b)
    train(ours, a, "triton")
    train(plain, b, "reference")
    for p in a:
        p.data = p.data.clone()
    made, right = train(ours, a, "triton"), train(plain, b, "reference")
    for x, y in zip(made, right, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@inside
@pytest.mark.parametrize("kept", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion, optim.LAMB])
def test_small_states_are_the_references(kept, cls):
    """The codes, scales and random numbers are those of plain torch, short last blocks too."""
    options = {"state_dtype": kept, "lr": 0.01} | ({"momentum": 0.9} if cls is optim.SGD else {})
    a, b = parameters(), parameters()
    ours, plain = cls(a, **options), cls(b, **options)
    made, right = train(ours, a, "triton"), train(plain, b, "reference")
    for x, y in zip(made, right, strict=True):
        assert (x - y).abs().mean() < 1e-5 if x.numel() else True
    for x, y in zip(all_states(ours), all_states(plain), strict=True):
        if x.dtype.itemsize == 1:
            assert (x.view(torch.uint8) != y.view(torch.uint8)).float().mean() < 0.002
        else:
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-6)


@inside
@pytest.mark.parametrize("cls", [optim.AdamW, optim.LAMB, optim.Adafactor])
def test_stochastic_rounding_is_the_references(cls):
    a, b = parameters(torch.bfloat16), parameters(torch.bfloat16)
    for p in (*a, *b):
        p.grad_dtype = torch.float32
    options = {"stochastic_rounding": True, "lr": 1e-3, "seed": 5}
    generator = torch.Generator().manual_seed(1)
    ours, plain = cls(a, **options), cls(b, **options)
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
    with fastllm.backend("triton"):
        ours.step()
    with fastllm.backend("reference"):
        plain.step()
    for x, y in zip(a, b, strict=True):
        assert (x != y).float().mean() < 0.01 if x.numel() else True


@inside
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-40, 1e30])
@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_hostile_gradients(value, kept):
    """What is not finite poisons its own block and no other; zeros stay zeros."""
    p = Parameter(torch.ones(4, 1024))
    optimizer = optim.AdamW([p], state_dtype=kept, lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(4, 1024)
    p.grad[1, 3] = value
    with fastllm.backend("triton"):
        optimizer.step()
        optimizer.step()
    blocks = p.detach().view(-1, 128)
    assert (blocks[:8] == 1).all() and (blocks[9:] == 1).all()
    if value != value:
        assert p[1, 3].isnan()


@inside
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_as_the_reference(nesterov):
    """Momentum and step are our kernels', matrices by columns too; inf changes nothing."""
    torch.manual_seed(0)
    start = [torch.randn(30, 50), torch.randn(64, 20), torch.randn(40, 30).t(), torch.randn(0, 3)]
    a, b = [Parameter(p.clone()) for p in start], [Parameter(p.clone()) for p in start]
    options = {"lr": 0.1, "weight_decay": 0.5, "max_grad_norm": 0.5, "nesterov": nesterov}
    ours, plain = optim.Muon(a, **options), optim.Muon(b, **options)
    for step in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = torch.empty_like(p).copy_(q.grad) * 8
        ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(float(step in (0, 2)))
        if step in (0, 2):
            a[0].grad.view(-1)[3] = float("inf")
        before = [t.detach().clone() for t in (*a, *all_states(ours))]
        with fastllm.backend("triton"):
            ours.step()
        if step == 2:
            after = [t.detach() for t in (*a, *all_states(ours))]
            assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        elif step != 0:
            with fastllm.backend("reference"):
                plain.step()
            assert float(ours.grad_norm) == pytest.approx(plain.grad_norm, rel=1e-5)
    for p, q, r in zip(a, b, start, strict=True):
        assert (p - q).norm() <= 0.03 * (q - r).norm()
    for x, y in zip(all_states(ours), all_states(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@inside
def test_what_is_refused():
    p = Parameter(torch.randn(50, 2)[:, 0])
    p.grad = torch.randn(50)
    with fastllm.backend("triton"), pytest.raises(fastllm.UnsupportedError, match="triton"):
        optim.AdamW([p]).step()


def launches():
    """Every launch of a step over meta tensors."""
    from fastllm.kernels import adafactor
    from fastllm.kernels import optim as kernels
    from fastllm.kernels.aot import meta, record

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        g, row, col = meta(2, 4096, 512, dtype=dtype), meta(2, 4096, 1), meta(2, 1, 512)
        yield from record(adafactor.squares, g)
        yield from record(adafactor.direction, g, row, col, meta(1), 1e-6)
    one, key = meta(1), meta(1, dtype=torch.int32)
    for dtype, grad, master, kept in (
        (torch.float32, torch.float32, False, (0, 0, 0)),
        (torch.bfloat16, torch.bfloat16, False, (0, 0, 0)),
        (torch.bfloat16, torch.float32, True, (0, 0, 0)),
        (torch.float16, torch.float16, True, (0, 0, 0)),
        (torch.float32, torch.float32, False, (1, 1, 0)),
        (torch.bfloat16, torch.bfloat16, False, (3, 4, 0)),
        (torch.float32, torch.bfloat16, False, (5, 6, 0)),
    ):
        for kind, count in ((0, 2), (0, 3), (1, 0), (1, 1), (2, 1)):
            fp32 = [meta(4096, 64) for _ in range(count)]
            row = (meta(4096, 64, dtype=dtype), meta(4096, 64, dtype=grad))
            rows = [[*row, meta(4096, 64) if master else None, *fp32]]
            batch = kernels.Batch(rows, [[0] * 8], kept[:count])
            yield from record(
                kernels.multi_step, batch, kind, meta(1, 2), key, one, one, 1e-3, 0.9, 0.99, 1e-8,
                1.0, 0.0, kind == 1, max(kept) > 0,
            )  # fmt: skip
        yield from record(kernels.squares, batch)


@pytest.mark.skipif(HERE, reason="compiled, not interpreted")
def test_compiles_everywhere(request):
    from fastllm.kernels import aot
    from triton.backends.compiler import GPUTarget

    todo = list(dict.fromkeys(launches()))
    assert len(todo) >= 20
    exhaustive = request.config.getoption("--exhaustive")
    for i, launch in enumerate(todo):
        targets = TARGETS if exhaustive else (TARGETS[i % len(TARGETS)],)
        for target in targets:
            kernel = aot.compile(launch, GPUTarget(*target))
            assert kernel.metadata.shared <= 48 * 1024
            text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            assert "v4.b32" in text or "dwordx4" in text, f"{launch} on {target}: no 16-byte access"
            if target[0] == "cuda":
                assert ".local" not in text, f"{launch} on {target}: spills"
