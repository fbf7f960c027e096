"""QuantLinear: moving, saving, loading, gradients, autocast, compile."""

import copy
import io
import pickle

import pytest
import torch
from quant_models import NAMES, Net, states_equal
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm.quant import Config, QuantLinear, float_state_dict
from fastllm.quant.calibrate import sqnr


@pytest.fixture
def x():
    return torch.randn(5, 7, 48)


# ---- the layer


@pytest.mark.parametrize("name", NAMES)
def test_moves_copies_and_pickles(name, x):
    model = Net()
    fastllm.quantize(model, name)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    codes = {n: b.clone() for n, b in model.up.named_buffers()}
    moved = model.to(torch.bfloat16).float().half().double()
    assert moved.up.weight.dtype == torch.float64 and moved.up.bias.dtype == torch.float64
    now = dict(moved.up.named_buffers())
    assert {n: b.dtype for n, b in now.items()} == {n: b.dtype for n, b in codes.items()} | {
        "_like": torch.float64
    }
    assert states_equal(
        {n: b for n, b in codes.items() if n != "_like"}, {n: now[n] for n in codes if n != "_like"}
    )
    assert model.to("meta").up.codes.is_meta


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_into_a_freshly_quantized_model(name, x, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    from safetensors.torch import load_file

    source, target = Net(), Net()
    fastllm.quantize(source, name)
    fastllm.quantize(target, name)
    assert not torch.equal(source(x), target(x))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    target.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(source(x), target(x))
    fastllm.quantize(third := Net(), name)
    third.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(source(x), third(x))


@pytest.mark.parametrize("how", ["empty", "assign", "float", "new"])
@pytest.mark.parametrize("name", ["int8", "int4_asym_g32", "nf4_double", "fp8"])
def test_models_without_memory_take_a_state_dict(name, how, x):
    """As large models are loaded: made on the meta device, filled or assigned to."""
    source, target = Net(), Net()
    state = source.state_dict()
    fastllm.quantize(source, name)
    if how == "new":
        options = {"format": name, "device": "meta"} | (
            {"format": "int8", "activations": "int8"} if name == "int8" else {}
        )
        target.up, target.down = QuantLinear(48, 144, **options), QuantLinear(144, 48, **options)
    else:
        fastllm.quantize(target, name)
    target.to("meta")
    if how == "empty":
        target.to_empty(device="cpu")
        for buffer in target.buffers():
            buffer.view(torch.uint8).fill_(0xA5)  # what memory happened to hold
    wanted = state if how == "float" else source.state_dict()
    target.load_state_dict(wanted, assign=how != "empty")
    assert target.up.weight.device.type == "cpu"
    assert torch.equal(target(x), source(x))
    target.to(torch.bfloat16)(x.bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_loads_a_float_state_dict(name, x):
    source, target = Net(), Net()
    fastllm.quantize(target, name)
    target.load_state_dict(source.state_dict())
    fastllm.quantize(source, name)
    assert torch.equal(source(x), target(x))


def test_the_quantized_state_as_a_float_one(x):
    source, target = Net(), Net()
    fastllm.quantize(source, "int4")
    target.load_state_dict(float_state_dict(source))
    assert torch.equal(target.up.weight, source.up.dense())


def test_another_format_or_shape_is_refused():
    source, target = Net(), Net()
    fastllm.quantize(source, "nf4")
    fastllm.quantize(target, "fp4")
    with pytest.raises(RuntimeError, match=r"expected fp4_g64 with float .*, found nf4_g64"):
        target.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="expected shape"):
        target.load_state_dict(Net(32).state_dict())
    bad = Net().state_dict()
    bad["up.weight"][0, 0] = float("inf")
    with pytest.raises(RuntimeError, match=r"up.weight: tensor: expected finite"):
        target.load_state_dict(bad)


def test_calibrated_scales_are_loaded(x):
    source, target = Net(), Net()
    fastllm.quantize(source, Config("int8", "int8_static", smooth=0.5), calibrate=x)
    fastllm.quantize(target, "int8")
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def test_a_layer_of_its_own(x):
    layer = QuantLinear(48, 16, format="int4", activations="float")
    assert layer(x).shape == (5, 7, 16)
    assert "int4_g32" in repr(layer)
    twin = QuantLinear.from_float(nn.Linear(48, 16), "int8", "int8")
    assert twin.activations == 1 and twin(x).shape == (5, 7, 16)
    layer.reset_parameters()
    with pytest.raises(ValueError, match="weight: expected shape"):
        layer.set_weight(torch.zeros(3, 3))


def test_weight_is_read_not_written(x):
    layer = QuantLinear(48, 16, format="int8")
    w = layer.weight
    assert (w.shape, w.dtype, w.device.type) == ((16, 48), torch.float32, "cpu")
    assert torch.equal(w + 0, layer.dense()) and torch.equal(x @ w.t(), x @ layer.dense().t())
    assert w.numpy().shape == (16, 48) and torch.equal(copy.deepcopy(w), layer.dense())
    for write in (lambda: w.add_(1), lambda: w.zero_(), lambda: w.__setitem__(0, 1.0)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="weight: it is computed"):
            write()
    with pytest.raises((KeyError, AttributeError)):
        layer.weight = nn.Parameter(torch.zeros(16, 48))
    goal = torch.randn(16, 48)
    layer.weight.data = goal
    assert sqnr(goal, layer.dense()) > 38


# ---- gradients, autocast, compile


@pytest.mark.parametrize("name", ["int8", "int8_weight", "int4", "nf4"])
def test_gradients_of_input_and_bias(name, x):
    layer = QuantLinear.from_float(
        nn.Linear(48, 16),
        *(("int8", "int8") if name == "int8" else (name.removesuffix("_weight"),)),
    )
    x.requires_grad_()
    upstream = torch.randn(5, 7, 16)
    dx, db = torch.autograd.grad(layer(x), [x, layer.bias], upstream)
    assert (dx - upstream @ layer.dense()).norm() <= 1e-5 * dx.norm()
    assert torch.allclose(db, upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), x, upstream)[0]
    assert torch.equal(again, dx)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_autocast(name, x):
    model = Net()
    fastllm.quantize(model, name)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.up(x).dtype == torch.bfloat16
        assert sqnr(expected, model(x)) > 25


@pytest.mark.parametrize("name", ["int8", "int4", "nf4_double", "fp8"])
def test_compile_in_one_graph(name, x):
    torch._dynamo.reset()
    model = Net()
    fastllm.quantize(model, name)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert sqnr(model(x), compiled(x)) > 60
    x.requires_grad_()
    upstream = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(m(x), x, upstream)[0] for m in (compiled, model))
    assert sqnr(theirs, ours) > 60


# ---- the activation behind it


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(48, 144), nn.GELU(), nn.Linear(144, 48)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


def by_layers(model, x):
    """The definition, layer by layer."""
    return model.down(nn.functional.gelu(model.up(x)))


@pytest.fixture
def seen(monkeypatch):
    """The activations that QuantLinear was asked for."""
    asked, own = [], QuantLinear.activated

    def activated(self, input, activation=None):
        asked.append(activation)
        return own(self, input, activation)

    monkeypatch.setattr(QuantLinear, "activated", activated)
    return asked


@pytest.mark.parametrize("config", ["int8", "int4", Config("int8", "int8", outliers=2.0)])
def test_swap_fuses_the_activation_behind_codes(config, seen, x):
    model = Feed().eval()
    fastllm.quantize(model, config, calibrate=x)
    with torch.no_grad():
        before = model(x)
        handle = fastllm.swap(model)
        seen.clear()
        assert torch.allclose(model(x), before, rtol=1e-3, atol=1e-4)
        assert seen == ["gelu", None]
        taken = []
        hook = model.up.register_forward_hook(lambda m, args, out: taken.append(out))
        model(x)  # who watches a layer sees that layer's output
        assert seen[2:] == [None, None] and taken[0].min() < -0.5
        hook.remove()
        seen.clear()
        many = torch.randn(500, 48)  # exponentials of many numbers are torch's own
        assert torch.allclose(model(many), by_layers(model, many), rtol=1e-3, atol=1e-4)
        assert seen[:2] == [None, None]
    y = model(x.requires_grad_())  # with gradients nothing is multiplied twice
    assert "gelu" not in seen
    (dx,) = torch.autograd.grad(y.sum(), x)
    handle.restore()
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(dx, wanted, rtol=1e-3, atol=1e-4)
