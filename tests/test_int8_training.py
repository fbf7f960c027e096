"""Training with int8 products: the same losses, reversible, honest about what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.quant import int8_training
from fastllm.quant.int8_training import Int8TrainingLinear, rounded_at_random

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _small_layers_too(monkeypatch):
    """Layers of a test are too small to gain: they multiply int8 all the same."""
    monkeypatch.setattr(int8_training, "worth", lambda input, weight: True)


worth = int8_training.worth


def network(width=64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def task(width=64):
    """Inputs and what another network makes of them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return x, torch.tanh(x @ mix)


def losses(model, steps=150):
    x, y = task()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    found = []
    for step in range(steps):
        rows = torch.arange(128) + step % 4 * 128
        loss = F.mse_loss(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("grad_weight", ["16bit", "float", "int8"])
def test_losses_are_those_of_float(grad_weight):
    """Through the whole curve, down to a tenth of where it starts, within 5%."""
    plain = losses(network())
    model = network()
    fastllm.quant.prepare_int8_training(model, grad_weight=grad_weight)
    found = losses(model)
    assert plain[-1] < 0.1 * plain[0]
    for start in range(0, 150, 30):
        mean = [sum(run[start : start + 30]) / 30 for run in (plain, found)]
        assert abs(mean[1] / mean[0] - 1) < 0.05


def test_products_are_of_int8_and_gradients_follow():
    torch.manual_seed(2)
    layer, x = nn.Linear(96, 80), torch.randn(40, 96, requires_grad=True)
    dy = torch.randn(40, 80)
    layer(x).backward(dy)
    wanted = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = None
    layer.zero_grad()
    handle = fastllm.quant.prepare_int8_training(layer)
    assert type(layer) is Int8TrainingLinear
    y = layer(x)
    assert not torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.backward(dy)
    for found, exact in zip((x.grad, layer.weight.grad, layer.bias.grad), wanted, strict=True):
        assert found.dtype == exact.dtype and found.shape == exact.shape
        assert (found - exact).norm() < 0.015 * exact.norm()
    handle.restore()


def test_restore_and_the_report():
    model = network()
    model.append(nn.Linear(64, 64))
    parameters, keys = list(model.parameters()), list(model.state_dict())
    handle = fastllm.quant.prepare_int8_training(model, exclude="3")
    assert [row.path for row in handle.report.quantized] == ["0", "2"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    again = fastllm.quant.prepare_int8_training(model)
    assert "already prepared" in str(again)
    again.restore()
    handle.restore()
    assert {type(m) for m in model} == {nn.Linear, nn.GELU}
    assert not hasattr(model[0], "grad_weight")


def test_random_rounding_is_right_on_average():
    x = torch.randn(4, 64)
    total = torch.zeros_like(x)
    for _ in range(400):
        codes, scales = rounded_at_random(x)
        assert codes.dtype == torch.int8
        total += codes * scales
    off = (total / 400 - x) / scales
    assert off.abs().max() < 0.15 and off.mean().abs() < 0.01  # one rounding: up to 1, 0.5 wide
    zeros, _ = rounded_at_random(torch.zeros(2, 8))
    assert not zeros.any()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_compiles_and_autocasts(dtype):
    model = network().to(dtype)
    fastllm.quant.prepare_int8_training(model)
    x = torch.randn(8, 64).to(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].weight.grad.dtype == dtype
    with torch.autocast("cpu", BF16):
        out = model(x)
        assert out.dtype == BF16
        out.float().sum().backward()


def test_copies_and_checkpointing():
    model = network()
    fastllm.quant.prepare_int8_training(model)
    x = torch.randn(16, 64)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    grads = []
    for run in (model, lambda v: torch.utils.checkpoint.checkpoint(model, v, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(model[0].weight.grad.clone())
    assert torch.equal(*grads)


def test_calls_that_would_not_gain_are_those_of_a_linear(monkeypatch):
    monkeypatch.setattr(int8_training, "worth", worth)
    layer, x = nn.Linear(64, 64), torch.randn(8, 64)
    wanted = layer(x)
    fastllm.quant.prepare_int8_training(layer)
    assert torch.equal(layer(x), wanted)
    large, wide = torch.randn(1024, 1024), torch.randn(512, 1024)
    assert worth(large, wide) == int8_training._DOTS
    assert not worth(large[:256, :512], wide[:, :512])
    assert not worth(large.bfloat16(), wide.bfloat16()) and not worth(large[:64], wide)
    with torch.autocast("cpu", BF16):
        assert not worth(large, wide)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="grad_weight"):
        fastllm.quant.prepare_int8_training(network(), grad_weight="fp4")
    with pytest.raises(ValueError, match="include"):
        fastllm.quant.prepare_int8_training(network(), include="nothing.*")
