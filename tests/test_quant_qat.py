"""QAT: what is trained is what is served, and it trains."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastllm.ops.quant.layout import limits
from fastllm.quant import Config, Format, QuantLinear, convert_qat, prepare_qat
from fastllm.quant.grid import snap
from fastllm.quant.qat import QATLinear

CONFIGS = (
    "int8", "int8_weight", "int4", "int4_asym_g32", "int4_g64", "nf4", "nf4_double", "fp8", "mxfp8",
    "int8_tensor", "fp8_block",
)  # fmt: skip
LOUD = Config("int8", "int8", outlier_threshold=6.0)
LEARNED = ("int8", "int8_weight", "int4", "int4_g128", "fp8", "int8_tensor")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48, bias=False)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_prepared_and_converted_agree_bit_for_bit(name, dtype):
    model = Net().to(dtype)
    prepare_qat(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for rows in (1, 3, 40, 17):
        x = torch.randn(rows, 48, dtype=dtype)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs = [torch.randn(*shape, 48).to(dtype) for shape in ((1,), (7,), (2, 33))]
    with torch.no_grad():
        before = [model(x) for x in inputs]
        convert_qat(model)
        assert type(model.up) is QuantLinear
        assert all(torch.equal(model(x), y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_ranges_agree_bit_for_bit_too(name):
    model = Net()
    prepare_qat(model, name, learn_ranges=True)
    before = model.up.ranges.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        x = torch.randn(30, 48)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, model.up.ranges)
    x = torch.randn(11, 48)
    with torch.no_grad():
        expected = model(x)
        convert_qat(model)
        assert torch.equal(model(x), expected)
    assert "ranges" not in "".join(model.state_dict())


def test_the_parameters_are_the_very_same():
    model = Net()
    before, keys = list(model.parameters()), list(model.state_dict())
    report = prepare_qat(model, "int4", exclude="down")
    assert [row.path for row in report.quantized] == ["up"]
    assert type(model.up) is QATLinear and type(model.down) is nn.Linear
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    x = torch.randn(3, 48)
    assert torch.equal(twin(x), model(x))
    assert prepare_qat(model, "int4", include="up").left[0].reason == "already prepared"


@pytest.mark.parametrize("name", ["int8", "int4", "nf4_double"])
def test_gradients_go_straight_through(name):
    """As of a plain layer with the dequantized weight."""
    layer = nn.Sequential(nn.Linear(48, 20))
    prepare_qat(layer, name)
    x, upstream = torch.randn(4, 5, 48, requires_grad=True), torch.randn(4, 5, 20)
    leaves = [x, layer[0].weight, layer[0].bias]
    ours = torch.autograd.grad(layer(x), leaves, upstream)
    weight = layer[0].qtensor().dequantize().requires_grad_()
    plain = nn.functional.linear(x, weight, layer[0].bias)
    theirs = torch.autograd.grad(plain, [x, weight, layer[0].bias], upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("form", [Format("int4", 32), Format("int8"), Format("int8", -1)])
def test_gradients_of_ranges_are_those_of_lsq(form):
    """Against autograd through the formula with a detached rounding."""
    layer = nn.Sequential(nn.Linear(70, 6, bias=False))
    prepare_qat(layer, form, learn_ranges=True)
    weight, ranges = layer[0].weight, layer[0].ranges
    with torch.no_grad():
        ranges.mul_(0.7)  # so that something is outside of the range
        if form.kind == "int4":
            ranges.copy_(ranges.bfloat16())
    x, upstream = torch.randn(9, 70), torch.randn(9, 6)
    dw, dr = torch.autograd.grad(layer(x), [weight, ranges], upstream)
    w, r = weight.detach().requires_grad_(), ranges.detach().requires_grad_()
    each = r if form.group <= 0 else r.repeat_interleave(form.group, 1)[:, :70]
    units, (low, high) = w / each, limits(form.code)
    clipped = units.clamp(low, high)
    rounded = clipped + (snap(clipped, form) - clipped).detach()
    exact = torch.autograd.grad(x @ (rounded * each).t(), [w, r], upstream)
    assert torch.allclose(dw, exact[0], rtol=1e-4, atol=1e-4)
    share = (r.numel() / w.numel() / high) ** 0.5
    assert torch.allclose(dr, exact[1] * share, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_autocast_and_conversion_agree(name):
    model, x = Net(), torch.randn(9, 48)
    prepare_qat(model, name)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        before.float().square().sum().backward()
        assert before.dtype == torch.bfloat16
        assert model.up.weight.grad.dtype == torch.float32
        with torch.no_grad():
            convert_qat(model)
            assert torch.equal(model(x), before)


def test_compile_in_one_graph():
    torch._dynamo.reset()
    model, x = Net(), torch.randn(9, 48)
    prepare_qat(model, "int4")
    upstream = torch.randn(9, 48)
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        y = forward(x)
        found.append([y, *torch.autograd.grad(y, list(model.parameters()), upstream)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("learn_ranges", [False, True])
def test_training_beats_rounding(learn_ranges):
    """A student of a float teacher of its own shape: there is no other error than int4's."""
    teacher = Net().requires_grad_(False)
    data, held_out = torch.randn(64, 32, 48), torch.randn(256, 48)
    student = copy.deepcopy(teacher)
    prepare_qat(student, "int4_g128", learn_ranges=learn_ranges)
    lost = (student(held_out) - teacher(held_out)).square().mean()
    optimizer = torch.optim.Adam(student.requires_grad_(True).parameters(), lr=1e-4)
    for step in range(256):
        optimizer.param_groups[0]["lr"] = 1e-4 * (1 - step / 256)
        x = data[step % 64]
        (student(x) - teacher(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    convert_qat(student)
    assert (student(held_out) - teacher(held_out)).square().mean() < 0.8 * lost


def test_heads_stay_float_and_reports_say_so():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(10).view(1, 10)
    report = prepare_qat(model, "int4")
    assert len(report.quantized) == 7 and [row.path for row in report.left] == ["lm_head"]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        report = convert_qat(model)
        assert torch.equal(model(ids).logits, expected)
    assert report.after < report.before and all(row.sqnr > 15 for row in report)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prepare_qat(m, "int8_static"), "config: expected one that needs no data"),
        (lambda m: prepare_qat(m, Config("int4_asym_g64", method="hqq")), "needs no data"),
        (lambda m: prepare_qat(m, "int4_asym_g32", learn_ranges=True), "learn_ranges: expected"),
        (lambda m: prepare_qat(m, "mxfp8", learn_ranges=True), "learn_ranges: mxfp8"),
        (lambda m: prepare_qat(m, LOUD), "config: expected one without outlier_threshold"),
        (lambda m: prepare_qat([m]), "model: expected a torch.nn.Module, found list"),
        (lambda m: convert_qat(m), "model: expected layers that prepare_qat"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(Net())


@pytest.mark.parametrize("learn_ranges", [False, True])
def test_a_weight_that_diverged_is_not_converted(learn_ranges):
    model = Net()
    prepare_qat(model, "int8", learn_ranges=learn_ranges)
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    assert model(torch.randn(2, 48)).isnan().any()
    with pytest.raises(ValueError, match="tensor: expected finite"):
        convert_qat(model)
    assert type(model.up) is QATLinear and type(model.down) is QATLinear
