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
def test_what_is_refused():
    p = Parameter(torch.randn(5000))
    p.grad = torch.randn(5000)
    for optimizer in (
        optim.AdamW([p], state_dtype="int8"),
        optim.AdamW([p], stochastic_rounding=True),
        optim.LAMB([p]),
    ):
        with fastllm.backend("triton"), pytest.raises(fastllm.UnsupportedError, match="triton"):
            optimizer.step()


def launches():
    """Every launch of a step over meta tensors."""
    from fastllm.kernels import optim as kernels
    from fastllm.kernels.aot import meta, record

    one = meta(1)
    for dtype, grad, master in (
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float16, torch.float16, True),
    ):
        for kind, count in ((0, 2), (0, 3), (1, 0), (1, 1), (2, 1)):
            fp32 = [meta(4096, 64) for _ in range(count)]
            row = (meta(4096, 64, dtype=dtype), meta(4096, 64, dtype=grad))
            rows = [[*row, meta(4096, 64) if master else None, *fp32]]
            batch = kernels.Batch(rows, [[0] * len(rows[0])])
            yield from record(
                kernels.multi_step, batch, kind, meta(1, 2), one, one, 1e-3, 0.9, 0.99, 1e-8, 1.0,
                0.0, kind == 1,
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
