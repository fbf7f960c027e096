"""fastllm.quantize on models: what changes, what is left, the way back, transformers, PEFT."""

import copy
import io

import pytest
import torch
from quant_models import NAMES, Net, gpt2, llama, states_equal
from torch import nn

import fastllm
from fastllm.quant import Config, QuantLinear, convert_qat, float_state_dict, prepare_qat
from fastllm.quant import quantize as quantize_tensor
from fastllm.quant.calibrate import sqnr


@pytest.fixture
def x():
    return torch.randn(5, 7, 48)


# ---- what it does


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_the_dequantized_weights(name, x):
    model = Net()
    before = model(x)
    handle = fastllm.quantize(model, name)
    assert isinstance(model.up, QuantLinear) and isinstance(model.up, nn.Linear)
    twin = Net()
    twin.load_state_dict(float_state_dict(model))
    assert torch.equal(twin.up.weight, model.up.dense())
    # activations of "int8" lose 8 bits, too
    allowed = 0.02 if name == "int8" else 1e-5
    assert (model(x) - twin(x)).norm() <= allowed * twin(x).norm()
    assert sqnr(before, model(x)) > (25 if "8" in name else 15)
    report = handle.report()
    assert [row.path for row in report.quantized] == ["up", "down"]
    assert report.after < report.before / (1.8 if "8" in name else 3.2)


def test_report_says_sizes_and_errors(x):
    model = Net()
    weight = model.up.weight.detach().clone()
    bytes_before = sum(p.nbytes for p in model.parameters())
    report = fastllm.quantize(model, "int4_g32", exclude="down").report()
    assert len(report) == 1 and report.before == bytes_before
    row = report.quantized[0]
    exact = quantize_tensor(weight, "int4_g32")
    assert row.sqnr == pytest.approx(sqnr(weight, exact.dequantize()), abs=1e-4)
    assert row.after == sum(b.nbytes for b in model.up.buffers()) + model.up.bias.nbytes
    assert report.after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert "int4_g32" in str(report) and "up" in str(report) and "kB" in str(report)
    assert report.worst is row


def test_errors_are_those_of_outputs_where_there_is_data(x):
    model = Net()
    inputs = torch.randn(64, 48) * torch.linspace(0.1, 3, 48)
    exact = model.up(inputs) - model.up.bias
    handle = fastllm.quantize(model, "int4", calibrate=inputs)
    found = model.up(inputs) - model.up.bias
    assert handle.report().rows[0].sqnr == pytest.approx(sqnr(exact, found), abs=0.05)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4_double"])
def test_restore_gives_the_very_model_back(name, x):
    model = Net()
    parameters, keys, kind = list(model.parameters()), list(model.state_dict()), type(model.up)
    attributes = set(vars(model.up))
    before = model(x)
    handle = fastllm.quantize(model, name)
    assert list(model.state_dict()) != keys
    handle.restore()
    handle.restore()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys and type(model.up) is kind
    assert set(vars(model.up)) == attributes
    assert torch.equal(model(x), before)


def test_a_context_restores_and_free_forgets(x):
    model = Net()
    before = model(x)
    with fastllm.quantize(model, "int4"):
        assert not torch.equal(model(x), before)
    assert torch.equal(model(x), before)
    handle = fastllm.quantize(model, "int8")
    handle.free()
    with pytest.raises(RuntimeError, match="freed"):
        handle.restore()


def test_originals_die_with_the_handle():
    import gc
    import weakref

    model = Net()
    gone = weakref.ref(model.up.weight)
    handle = fastllm.quantize(model, "int8")
    gc.collect()
    assert gone() is not None
    del handle
    gc.collect()
    assert gone() is None


def test_hooks_and_shared_modules_stay(x):
    model = Net()
    model.again = model.up
    seen = []
    model.up.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    handle = fastllm.quantize(model, "int8")
    assert model.again is model.up and len(handle.modules) == 2
    model(x)
    assert seen == [(5, 7, 144)]


def test_quantizing_again_does_nothing(x):
    model = Net()
    fastllm.quantize(model, "int8")
    before = model(x)
    report = fastllm.quantize(model, "int4").report()
    assert not report.quantized
    assert {row.reason for row in report.left} == {"already quantized"}
    assert torch.equal(model(x), before)


def test_include_and_exclude():
    model = nn.ModuleDict({"a": Net(), "b": Net()})
    report = fastllm.quantize(model, include="a.*", exclude=lambda path, m: path == "a.up").report()
    assert [row.path for row in report.quantized] == ["a.down"]
    with pytest.raises(ValueError, match="include: 'c' matches no module"):
        fastllm.quantize(model, include="c")


def test_what_is_left_and_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict(
        {
            "own": Own(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "int": nn.Linear(8, 8, bias=False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
            "pruned": nn.utils.prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5),
            "meta": nn.Linear(8, 8, device="meta"),
            "good": nn.Linear(8, 8),
        }
    )
    model["int"].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    report = fastllm.quantize(model, "int8").report()
    reasons = {row.path: row.reason for row in report}
    assert reasons["good"] == ""
    assert "forward of its own" in reasons["own"]
    assert "MultiheadAttention" in reasons["attention.out_proj"]
    assert "int8" in reasons["int"] and "meta" in reasons["meta"]
    assert "subclass" in reasons["normed"] and "permanent" in reasons["pruned"]


def test_an_error_leaves_the_model_as_it_was(x):
    model = Net()
    with torch.no_grad():
        model.down.weight[3, 4] = float("nan")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="down: tensor: expected finite"):
        fastllm.quantize(model, "int8")
    assert type(model.up) is nn.Linear and states_equal(state, model.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fastllm.quantize(3), TypeError, "model: expected a torch.nn.Module, found int"),
        (lambda m: fastllm.quantize(m, "int3"), ValueError, "config: expected .*int3"),
        (lambda m: fastllm.quantize(m, 8), TypeError, "config: expected a name"),
        (lambda m: fastllm.quantize(m, min_weights=-1), ValueError, "min_weights: expected 0 or"),
        (lambda m: fastllm.quantize(m, "int8_static"), ValueError, "calibrate: expected batches"),
        (lambda m: fastllm.quantize(m, calibrate=[]), ValueError, "calibrate: the list"),
        (lambda m: Config("nf4", "int8"), ValueError, "activations: expected 'float'"),
        (lambda m: Config("int8", "int7"), ValueError, "activations: expected one of"),
        (lambda m: Config(method="best"), ValueError, "method: expected one of"),
        (lambda m: Config("int4", method="hqq"), ValueError, "asymmetric"),
        (lambda m: Config("nf4_double", method="gptq"), ValueError, "method: 'gptq' expects"),
        (lambda m: Config(smooth=2.0), ValueError, "smooth: expected a number"),
        (lambda m: Config(smooth="0.5"), TypeError, "smooth: expected a number or None"),
        (lambda m: Config(head="no"), TypeError, "head: expected True or False, found 'no'"),
        (lambda m: fastllm.quantize(m, calibrate="text"), TypeError, "calibrate: expected"),
        (lambda m: Config(smooth=0.5, method="awq"), ValueError, "smooth"),
        (lambda m: Config(outliers=6.0), ValueError, "outliers: expected rounded"),
        (lambda m: Config("int8", "int8", outliers=-1.0), ValueError, "outliers: expected a pos"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(Net())


# ---- transformers, PEFT, swap


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_llama_keeps_its_head_and_generates(name):
    model, ids = llama(), torch.arange(12).view(1, 12)
    before = model(ids).logits
    report = fastllm.quantize(model, name).report()
    assert len(report.quantized) == 14
    assert [row.path for row in report.left] == ["lm_head"]
    assert sqnr(before, model(ids).logits) > (25 if name == "int8" else 12)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)


def test_tied_heads_are_left_or_untied_and_said_so():
    ids = torch.arange(12).view(1, 12)
    model = llama(tied=True)
    report = fastllm.quantize(model, "int8").report()
    assert "tied: model.embed_tokens, lm_head" in report.left[0].reason
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model = llama(tied=True)
    before = model(ids).logits
    handle = fastllm.quantize(model, Config("int8", head=True))
    row = next(row for row in handle.report() if row.path == "lm_head")
    assert row.new and "no longer tied" in row.note and "float" in row.note
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert sqnr(before, model(ids).logits) > 25
    handle.restore()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(before, model(ids).logits)


def test_other_shared_weights_are_left():
    model = Net()
    model.other = nn.Linear(48, 144)
    model.other.weight = model.up.weight
    report = fastllm.quantize(model, "int8").report()
    assert {row.path for row in report.left} == {"up", "other"}
    assert all("shared: up, other" in row.reason for row in report.left)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_gpt2_with_its_transposed_weights(name, tmp_path):
    model, ids = gpt2(), torch.arange(12).view(1, 12)
    state = copy.deepcopy(model.state_dict())
    before = model(ids).logits
    handle = fastllm.quantize(model, name)
    assert len(handle.modules) == 8
    assert sqnr(before, model(ids).logits) > (25 if name == "int8" else 12)
    expected = model(ids).logits
    model.load_state_dict(state)
    assert torch.equal(model(ids).logits, expected)
    assert all(v.shape == state[n].shape for n, v in float_state_dict(model).items())
    handle.restore()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4"])
def test_lora_adapters_train_and_merge(name):
    peft = pytest.importorskip("peft")
    model = llama()
    fastllm.quantize(model, name)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    model = peft.get_peft_model(model, config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.eval()
    expected = model(ids).logits
    merged = model.merge_and_unload()
    # what the adapters learned survives being rounded into the codes
    layer = merged.model.layers[0].mlp.down_proj
    assert isinstance(layer, QuantLinear)
    assert sqnr(expected, merged(ids).logits) > (20 if name == "int8" else 5)


def test_adapters_are_not_quantized_but_their_base_is():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    report = fastllm.quantize(model, "int8").report()
    adapters = [row for row in report if "lora_" in row.path]
    assert adapters and all(row.reason == "an adapter" for row in adapters)
    assert any(row.path.endswith("q_proj.base_layer") for row in report.quantized)


@pytest.mark.parametrize("first", ["swap", "quantize"])
def test_together_with_swap(first):
    model, ids = llama(), torch.arange(12).view(1, 12)
    before = model(ids).logits
    if first == "swap":
        swapped = fastllm.swap(model)
        handle = fastllm.quantize(model, "int8")
    else:
        handle = fastllm.quantize(model, "int8")
        swapped = fastllm.swap(model)
    assert len(handle.modules) == 14
    assert sqnr(before, model(ids).logits) > 25
    handle.restore()
    swapped.restore()
    assert torch.equal(model(ids).logits, before)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_progress_is_a_line_on_a_terminal(monkeypatch):
    from fastllm.quant import progress

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        bar = progress.Progress(stream)
        bar.step(0.5, "model.layers.0")
        bar.close()
        assert ("model.layers.0" in stream.getvalue()) == expected


# ---- layers that are faster in float


def mixed():
    return nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 4096))


def test_layers_that_would_be_slower_stay_in_float(by_size):
    model = mixed()
    weight = model[0].weight
    report = fastllm.quantize(model, "int4", progress=False).report()
    assert model[0].weight is weight and type(model[0]) is nn.Linear
    assert [row.path for row in report.quantized] == ["1"]
    assert report.left[0].reason == "3072 weights: faster in float"
    assert "1 layer with fewer than 131072 weights stayed in float" in str(report)
    assert "min_weights=0" in str(report)
    # the same layers, whatever the dtype: its state_dict fits there
    other = mixed().bfloat16()
    fastllm.quantize(other, "int4", progress=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[1].codes, model[1].codes)
    calibrated = mixed()
    config = Config("int4", method="gptq")
    report = fastllm.quantize(calibrated, config, calibrate=torch.randn(9, 64)).report()
    assert type(calibrated[0]) is nn.Linear and len(report.quantized) == 1


@pytest.mark.parametrize("least", [0, 3072, 3073])
def test_the_least_weights_are_the_callers_to_choose(least, by_size):
    wishes = ({"config": Config("int8", min_weights=least)}, {"min_weights": least})
    for wish in wishes:
        model = mixed()
        report = fastllm.quantize(model, **wish).report()
        assert len(report.quantized) == (1 if least == 3073 else 2), report


def test_training_leaves_the_same_layers_alone(by_size):
    for least in (None, 0):
        trained, served = mixed(), mixed()
        prepare_qat(trained, "int8", min_weights=least)
        convert_qat(trained)
        fastllm.quantize(served, "int8", min_weights=least)
        assert [type(m) for m in trained] == [type(m) for m in served]
        served.load_state_dict(trained.state_dict())
        x = torch.randn(3, 64)
        assert torch.equal(trained(x), served(x))
