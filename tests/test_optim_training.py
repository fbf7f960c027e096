"""Training with 8-bit states: as good as float32's, and stable where naive 8 bits are not."""

import pytest
import torch
from torch.nn import Parameter

from fastllm import optim


def hills(seed=0):
    """A quadratic whose curvatures lie six orders of magnitude apart within each block."""
    g = torch.Generator().manual_seed(seed)
    steep = 10 ** torch.linspace(-4, 2, 128).repeat(64)
    return Parameter(torch.randn(64 * 128, generator=g)), steep


def linear(x, most):
    """Blocks of 128 in 8 linear bits, rounded to the nearest: what naive 8-bit states are."""
    blocks = x.view(-1, 128)
    unit = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30) / most
    return ((blocks / unit).round() * unit).flatten()


def naive(p, steep, steps, lr):
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, steps + 1):
        g = steep * p
        m, v = linear(0.9 * m + 0.1 * g, 127), linear(0.999 * v + 0.001 * g * g, 255)
        p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


def descend(kept):
    """(loss after 300 steps, largest parameter on the way, both over those at the start)."""
    p, steep = hills()
    start, largest = p.detach().clone(), 0.0
    optimizer = optim.AdamW([p], lr=0.01, weight_decay=0.0, state_dtype=kept)
    for _ in range(300):
        p.grad = steep * p.detach()
        optimizer.step()
        largest = max(largest, p.abs().max().item())
    losses = [(steep * x.square()).sum().item() for x in (p.detach(), start)]
    return losses[0] / losses[1], largest / start.abs().max().item()


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_stable_where_naive_8_bits_diverge(kept):
    """The loss falls as far as with float32 states, to within 5%, and nothing ever grows."""
    p, steep = hills()
    start = p.detach().clone()
    lost = naive(start, steep, 300, 0.01)
    assert not lost.abs().max() < 100 * start.abs().max()
    loss, largest = descend(kept)
    assert loss <= 1.05 * descend("fp32")[0] < 0.02
    assert largest < 1.0


def test_lean_training_keeps_the_loss():
    """Autocast, accumulation, clipping and 8-bit states on a tiny Llama, float16's scaling too."""
    pytest.importorskip("transformers")
    from fastllm.cli.demo import lean
    from fastllm.cli.demo.llama import Size

    tiny = Size(hidden=64, layers=2, heads=4, key_heads=2, intermediate=128, length=32, batch=4)
    for dtype in (torch.bfloat16, torch.float16):
        found = lean.compare(tiny, steps=12, dtype=dtype)
        assert found.losses["lean"][-1] < found.losses["lean"][0] - 0.2
        assert found.last("lean", 3) == pytest.approx(found.last("float32", 3), rel=0.02)
        assert found.state_bytes["lean"] < 0.35 * found.state_bytes["float32"]
        assert len(lean.rows(found)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_llama_ends_within_one_percent(seed):
    pytest.importorskip("transformers")
    from fastllm.cli.demo import lean

    found = lean.compare(lean.QUICK, steps=150, seed=seed)
    assert found.last("lean") == pytest.approx(found.last("float32"), rel=0.01)
    assert found.state_bytes["lean"] <= 0.30 * found.state_bytes["float32"]
