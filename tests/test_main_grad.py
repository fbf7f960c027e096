"""linear_main_grad: weight gradients summed in float32, in a buffer of the caller's."""

import copy

import pytest
import torch

import fastllm
from fastllm import functional as F
from fastllm.core.proof import compare


def operands(dtype, rows=(3, 37), features=40, out=24):
    x = torch.randn(*rows, features).to(dtype)
    w = torch.randn(out, features).to(dtype)
    return x, w, torch.randn(out).to(dtype), torch.randn(*rows, out).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", [None, "cpu", "torch", "reference"])
def test_it_is_linear_with_another_place_for_dw(dtype, backend):
    if dtype == torch.float64 and backend == "cpu":
        pytest.skip("the kernels have no float64")
    x, w, b, upstream = operands(dtype)
    x, w, b = (t.requires_grad_() for t in (x, w, b))
    wide = torch.promote_types(dtype, torch.float32)
    before, before_bias = torch.randn(24, 40, dtype=wide), torch.randn(24, dtype=wide)
    total, total_bias = before.clone(), before_bias.clone()
    y = F.linear_main_grad(
        x, w, b, main_grad=total, bias_main_grad=total_bias, backend=backend
    )  # fmt: skip
    stock = torch.nn.functional.linear(x, w, b)
    y.backward(upstream)
    assert w.grad is None and b.grad is None
    dx, dw, db = torch.autograd.grad(stock, (x, w, b), upstream)
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    out = torch.nn.functional.linear(*exact)
    ex, ew, eb = torch.autograd.grad(out, exact, upstream.double())
    triples = {
        "y": (y.detach(), stock.detach(), out.detach()),
        "dx": (x.grad, dx, ex),
        "dW": (total, before + dw.to(wide), before.double() + ew),
        "db": (total_bias, before_bias + db.to(wide), before_bias.double() + eb),
    }
    for name, triple in triples.items():
        proof = compare(name, *triple)
        assert proof.ok, proof.message


def test_small_gradients_are_not_lost_in_bfloat16():
    layer = fastllm.nn.Linear(16, 8, bias=False).bfloat16()
    twin = copy.deepcopy(layer)
    layer.weight.main_grad = torch.zeros(8, 16)
    layer.accumulates = True
    inputs = [torch.rand(4, 16).bfloat16() for _ in range(600)]
    for x in inputs:
        layer(x).sum().backward()
        twin(x).sum().backward()
    exact = sum(x.double().sum(0) for x in inputs).expand(8, 16)
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.weight.main_grad.double(), exact, rtol=1e-6, atol=0)
    assert (twin.weight.grad.double() - exact).abs().max() > 0.1 * exact.max()


def test_module_without_a_buffer_autocast_and_frozen_weights():
    layer, x = fastllm.nn.Linear(16, 8), torch.randn(5, 16)
    layer.accumulates = True
    layer(x).sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    layer.weight.main_grad = torch.zeros(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, expected, rtol=2e-2, atol=2e-2)
    assert layer.weight.grad is None and layer.bias.grad is not None
    layer.weight.requires_grad_(False)
    kept = layer.weight.main_grad.clone()
    layer(x.requires_grad_()).sum().backward()
    assert torch.equal(layer.weight.main_grad, kept) and x.grad is not None


def test_checkpointing_adds_once():
    from torch.utils.checkpoint import checkpoint

    layer, x = fastllm.nn.Linear(16, 8, bias=False), torch.randn(5, 16, requires_grad=True)
    layer.accumulates, layer.weight.main_grad = True, torch.zeros(8, 16)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, x.detach().sum(0).expand(8, 16))


def test_what_does_not_fit_is_said():
    x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    for buffer in (torch.zeros(4, 5), torch.zeros(5, 4).half(), torch.zeros(4, 5).t()):
        with pytest.raises(ValueError, match=r"main_grad: expected contiguous torch.float32"):
            F.linear_main_grad(x, w, main_grad=buffer)
    with pytest.raises(TypeError, match="main_grad: expected a Tensor, found NoneType"):
        F.linear_main_grad(x, w, main_grad=None)
    with pytest.raises(ValueError, match="bias_main_grad: expected None without a bias"):
        F.linear_main_grad(x, w, main_grad=torch.zeros(5, 4), bias_main_grad=torch.zeros(5))
