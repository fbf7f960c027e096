"""HQQ, GPTQ, AWQ, SmoothQuant, static scales: better than rounding to the nearest."""

import copy

import pytest
import torch
from torch import nn

import fastllm
from fastllm.quant import Config, calibrate
from fastllm.quant import quantize as quantize_tensor
from fastllm.quant.calibrate import sqnr
from fastllm.quant.gptq import inverse_factor
from fastllm.quant.hqq import hqq
from fastllm.quant.methods import encode

WIDTH, ROWS = 256, 192


def activations(count, outliers=6, seed=0):
    """Correlated channels, six of them 30 times as large: what the inputs of a transformer have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH**0.5
    x = torch.randn(count, WIDTH, generator=generator) @ (mix + 0.5 * torch.eye(WIDTH))
    x[:, torch.arange(outliers) * 37 % WIDTH] *= 30
    return x


def outputs(config, weight, x, calibration):
    """SQNR in dB of a layer's outputs on inputs that calibration has not seen."""
    layer = nn.Sequential(nn.Linear(WIDTH, ROWS, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(weight)
        exact = layer(x)
        fastllm.quantize(layer, config, calibrate=calibration)
        return sqnr(exact, layer(x))


@pytest.fixture(scope="module")
def layer():
    """(weight, calibration inputs, held-out inputs)"""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, WIDTH, generator=generator)
    return weight, activations(1024), activations(512, seed=3)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "int4_asym_g64", "nf4", "fp8", "int8"])
def test_gptq_beats_rounding(layer, name):
    weight, calibration, x = layer
    plain = outputs(Config(name), weight, x, calibration)
    assert outputs(Config(name, method="gptq"), weight, x, calibration) > plain + 0.8


@pytest.mark.parametrize("name", ["int4_g32", "int4_asym_g64", "nf4", "int8"])
def test_act_order_beats_the_order_of_the_columns(layer, name):
    weight, calibration, x = layer
    plain = outputs(Config(name, method="gptq"), weight, x, calibration)
    ordered = Config(name, method="gptq", act_order=True)
    assert outputs(ordered, weight, x, calibration) > plain + 0.3
    assert "act order" in str(ordered)
    with pytest.raises(ValueError, match="act_order"):
        Config(name, act_order=True)


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128", "nf4"])
def test_awq_beats_rounding(layer, name):
    weight, calibration, x = layer
    plain = outputs(Config(name), weight, x, calibration)
    assert outputs(Config(name, method="awq"), weight, x, calibration) > plain + 1.0


def test_awq_never_does_worse_on_its_data():
    weight, x = torch.randn(32, 64), torch.randn(200, 64)
    for name in ("int4_g32", "nf4"):
        plain, found = (
            encode(weight, Config(name, method=m), stats_of(x)) for m in ("round", "awq")
        )
        dense = found.q.dequantize() * (1.0 if found.input_scale is None else found.input_scale)
        gram = x.t() @ x
        assert sqnr(weight, dense, gram) >= sqnr(weight, plain.q.dequantize(), gram)


def stats_of(x):
    made = calibrate.empty(x.shape[1], x.device)
    made.add(x)
    return made


@pytest.mark.parametrize("name", ["int4_asym_g32", "int4_asym_g64", "int4_asym_g128"])
def test_hqq_beats_rounding_without_data(layer, name):
    _, _, x = layer
    weight = torch.distributions.StudentT(5.0).sample((ROWS, WIDTH))
    plain = outputs(Config(name), weight, x, None)
    assert outputs(Config(name, method="hqq"), weight, x, None) > plain + 0.3


def test_hqq_takes_any_width_and_zeros():
    weight = torch.randn(5, 71)
    weight[2] = 0
    q = hqq(weight, fastllm.quant.parse("int4_asym_g32"))
    assert torch.equal(q.dequantize()[2], torch.zeros(71))
    assert (
        sqnr(weight, q.dequantize())
        >= sqnr(weight, quantize_tensor(weight, q.format).dequantize()) - 0.3
    )


def test_figures_of_w8a8_with_outliers():
    """Gaussian weights and inputs, then with six channels 30 times as large, in dB."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 1024, generator=generator)
    weight = torch.randn(256, 1024, generator=generator)
    loud = x.clone()
    loud[:, :6] *= 30

    def measured(config, inputs):
        layer = nn.Sequential(nn.Linear(1024, 256, bias=False))
        with torch.no_grad():
            layer[0].weight.copy_(weight)
            exact = layer(inputs)
            fastllm.quantize(layer, config, calibrate=inputs)
            return sqnr(exact, layer(inputs))

    assert measured("int8_weight", x) > 41.7 - 1
    assert measured("int8", x) > 38.7 - 1
    rounded = measured("int8", loud)
    smoothed = measured(Config("int8", "int8", smooth=0.5), loud)
    assert rounded > 24.0 - 1
    assert smoothed > 35.4 - 1 and smoothed > rounded + 6
    # six columns in float: what is left are the errors of the others, below the outliers' signal
    assert measured(Config("int8", "int8", outliers=6.0), loud) > 44.3 - 1


def test_static_scales_cover_what_was_seen():
    x = torch.randn(64, 48)
    model = nn.Sequential(nn.Linear(48, 32))
    exact = model(x)
    fastllm.quantize(model, "int8_static", calibrate=[x[:40], x[40:]])
    assert model[0].act_scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert sqnr(exact, model(x)) > 30
    assert torch.isfinite(model(100 * x)).all()


def test_outliers_stay_in_float(tmp_path):
    x = torch.randn(64, 48)
    x[:, [3, 40]] *= 20
    model = nn.Sequential(nn.Linear(48, 32))
    weight, exact = model[0].weight.detach().clone(), model(x)
    fastllm.quantize(model, Config("int8", "int8", outliers=6.0), calibrate=x)
    assert model[0].outliers.tolist() == [3, 40]
    assert torch.equal(model[0].dense()[:, [3, 40]], weight[:, [3, 40]])
    assert sqnr(weight, model[0].dense()) > 38 and sqnr(exact, model(x)) > 40
    other = nn.Sequential(nn.Linear(48, 32))
    fastllm.quantize(other, "int8")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    goal = nn.Linear(48, 32)
    model.load_state_dict({"0." + n: t for n, t in goal.state_dict().items()})
    assert torch.equal(model[0].outlier_weight, goal.weight[:, [3, 40]])
    assert sqnr(goal(x), model(x)) > 40
    half = model.to(torch.bfloat16)
    assert half[0].outlier_weight.dtype == torch.bfloat16 and half[0].input_scale[0] == 1
    assert sqnr(goal(x), half(x.bfloat16()).float()) > 35


def test_what_calibration_never_reaches_is_rounded():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    model, weight = Two(), None
    weight = model.idle.weight.detach().clone()
    config = Config("int4_g32", method="gptq")
    report = fastllm.quantize(model, config, calibrate=torch.randn(30, 16)).report()
    notes = {row.path: row.note for row in report}
    assert notes["used"] == "" and "never reached" in notes["idle"]
    assert torch.equal(model.idle.dense(), quantize_tensor(weight, "int4_g32").dequantize())
    report = fastllm.quantize(Two(), "int8_static", calibrate=torch.randn(30, 16)).report()
    assert len(report.quantized) == 2


def test_portions_give_the_same_as_all_at_once(monkeypatch):
    """One layer at a time sees earlier ones quantized; a single layer sees the same either way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
    x, config = torch.randn(100, 48), Config("int4_g32", method="gptq")
    found = []
    for limit in (1 << 30, 1):
        monkeypatch.setattr(calibrate, "GRAMS", limit)
        twin = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 48))
        twin.load_state_dict(model.state_dict())
        fastllm.quantize(twin, config, calibrate=x)
        found.append((twin[0].codes, sqnr(model(x), twin(x))))
    assert torch.equal(found[0][0], found[1][0])
    assert found[1][1] > 15


def test_loaders_and_generators_are_lists_of_batches():
    layer, x = nn.Linear(8, 8), torch.randn(20, 8)
    batches = list(x.split(5))
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=5)
    found = []
    for given in (batches, iter(batches), torch.utils.data.DataLoader(x, batch_size=5), pairs):
        model = nn.Sequential(copy.deepcopy(layer))
        fastllm.quantize(model, Config("int4", method="gptq"), calibrate=given)
        found.append(model[0].codes)
    assert all(torch.equal(found[0], codes) for codes in found)


@pytest.mark.parametrize("method, tokens, said", [("gptq", 7, 1), ("gptq", 8, 0), ("awq", 7, 0)])
def test_too_few_tokens_are_said(method, tokens, said):
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(tokens, 8)
    report = fastllm.quantize(model, Config("int4", method=method), calibrate=x).report()
    notes = [note for note in report.notes if "tokens for layers of 8 inputs" in note]
    assert len(notes) == said and all(note in str(report) for note in notes)


def test_calibration_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).train()
    buffers = [b.clone() for b in model.buffers()]
    x, state = torch.randn(20, 8), torch.get_rng_state()
    fastllm.quantize(model, Config("int8", smooth=0.5), calibrate=x)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model[1].buffers(), strict=True))
    assert model.training and model[2].training
    assert torch.equal(state, torch.get_rng_state())
    assert not model[0]._forward_pre_hooks


def test_bad_calibration_is_named_and_undone():
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match="calibrate: an input of a layer holds NaN"):
        fastllm.quantize(model, Config("int8", smooth=0.5), calibrate=x)
    assert type(model[0]) is nn.Linear


def test_the_factor_is_that_of_the_inverse():
    x = torch.randn(200, 40)
    gram = x.t() @ x
    upper = inverse_factor(gram, damp=1e-9).double()
    assert torch.allclose(upper.t() @ upper, torch.linalg.inv(gram.double()), rtol=1e-3, atol=1e-6)
    assert torch.isfinite(inverse_factor(torch.zeros(8, 8))).all()
    assert torch.isfinite(inverse_factor(torch.ones(8, 8))).all()
