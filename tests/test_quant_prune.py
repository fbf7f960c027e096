"""Pruning: the right weights go, masks survive training, structured pruning shrinks the model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as stock

import fastllm
from fastllm.quant import prune, prune_channels, prune_heads
from fastllm.quant.calibrate import sqnr


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))


def inputs(count=400, seed=0):
    """Correlated channels of different sizes: weights matter by what they meet."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(9)
    mix = torch.randn(64, 64, generator=fixed) / 8
    sizes = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=fixed)]
    return torch.randn(count, 64, generator=generator) @ mix * sizes


def llama(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=32, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_the_asked_share_is_zero(method, pattern):
    model, x = net(), inputs()
    made = prune(model, 0.5, method, pattern, calibrate=x)
    assert made.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) for row in made)
    for layer in (model[0], model[2]):
        assert stock.is_pruned(layer)
        zeros = (layer.weight == 0).float()
        assert torch.equal(layer.weight == 0, layer.weight_mask == 0)
        if pattern:
            assert (zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all()
        elif method == "wanda":
            assert (zeros.sum(1) == zeros.shape[1] // 2).all()


def test_magnitude_takes_the_smallest():
    model = net()
    before = model[0].weight.detach().abs()
    prune(model, 0.3)
    gone = model[0].weight == 0
    assert before[gone].max() <= before[~gone].min()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_data_helps(pattern):
    """SparseGPT before Wanda before magnitude, on inputs that none of them has seen."""
    torch.manual_seed(0)
    model, unseen = nn.Sequential(nn.Linear(64, 96, bias=False)), inputs(200, seed=5)
    exact = model(unseen)
    found = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        twin = copy.deepcopy(model)
        prune(twin, 0.5, method, pattern, calibrate=inputs())
        found[method] = sqnr(exact, twin(unseen))
    assert found["sparsegpt"] > found["wanda"] + 0.3
    assert found["wanda"] > found["magnitude"] + 1


def test_masks_survive_training():
    model, x = net(), inputs()
    prune(model, 0.6, "sparsegpt", calibrate=x)
    zeros = [model[i].weight == 0 for i in (0, 2)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(30):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        model(x)
    assert all(torch.equal(model[i].weight == 0, z) for i, z in zip((0, 2), zeros, strict=True))


def test_finalize_restore_and_torchs_own_tools():
    model, x = net(), inputs()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        exact = model(x)
    made = prune(model, 0.5, "sparsegpt", calibrate=x)
    made.restore()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(x), exact) and not stock.is_pruned(model)
    made = prune(model, 0.5, include="0")
    assert [row.path for row in made] == ["0"]
    stock.l1_unstructured(model[0], "weight", 0.5)  # on top, by torch
    assert float((model[0].weight == 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    made.finalize()
    assert not stock.is_pruned(model) and list(model.state_dict()) == list(before)
    with pytest.raises(RuntimeError, match="permanent"):
        made.restore()


def test_pruned_then_quantized_keeps_its_zeros():
    model = net()
    prune(model, 0.5, pattern=(2, 4)).finalize()
    zeros = model[0].weight == 0
    fastllm.quantize(model, "int8")
    assert bool((model[0].dense()[zeros] == 0).all())


def test_conv1d_and_heads():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.arange(12).view(1, 12)
    made = prune(model, 0.5, "wanda", calibrate={"input_ids": ids})
    assert [row.path for row in made if row.reason] == ["lm_head"]
    assert (model.transformer.h[0].mlp.c_fc.weight == 0).float().mean(0).eq(0.5).all()
    assert torch.isfinite(model(ids).logits).all()


def test_widths_that_have_no_pattern_are_left():
    model = nn.Sequential(nn.Linear(10, 6))
    made = prune(model, pattern=(2, 4))
    assert "no multiple of 4" in made.rows[0].reason and not stock.is_pruned(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: prune(m, 1.0), "amount: expected"),
        (lambda m: prune(m, method="best"), "method: expected"),
        (lambda m: prune(m, method="wanda"), "calibrate: expected batches for 'wanda'"),
        (lambda m: prune(m, pattern=(4, 2)), "pattern: expected"),
        (lambda m: prune(m, pattern="2:4"), r"pattern: expected .*, found '2:4'"),
        (lambda m: prune(m, pattern=2), "pattern: expected .*, found 2"),
        (lambda m: prune(m, "half"), "amount: expected a number, found str"),
        (lambda m: prune(0.5), "model: expected a torch.nn.Module, found float"),
        (lambda m: prune_heads(None, 0.5), "model: expected a torch.nn.Module, found NoneType"),
        (lambda m: prune_channels(m, -0.1), "amount: expected"),
        (lambda m: prune_channels(nn.Sequential(nn.Linear(3, 3)), 0.5), "model: expected blocks"),
        (lambda m: prune_heads(m, 0.5), "model: expected blocks"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(net())


# ---- structured


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("calibrated", [False, True])
def test_channels_go_and_the_rest_computes_the_same(calibrated):
    """The smaller model is the larger one with the same channels set to zero."""
    model, ids = llama(), torch.arange(12).view(1, 12)
    zeroed = copy.deepcopy(model)
    data = {"input_ids": ids} if calibrated else None
    rows = prune_channels(model, 0.25, calibrate=data)
    assert [(row.before, row.after) for row in rows] == [(96, 72)] * 2
    for row in rows:
        mlp = zeroed.get_submodule(row.path)
        gone = sorted(set(range(96)) - set(row.kept))
        with torch.no_grad():
            mlp.down_proj.weight[:, gone] = 0
    assert torch.allclose(model(ids).logits, zeroed(ids).logits, atol=1e-5)
    assert count(zeroed) - count(model) == 2 * 3 * 24 * 64
    assert model.config.intermediate_size == 72
    fresh = type(model)(model.config).eval()  # an ordinary model of the new size
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, model(ids).logits)


@pytest.mark.parametrize("calibrated", [False, True])
def test_heads_go_and_the_rest_computes_the_same(calibrated):
    model, ids = llama(), torch.arange(12).view(1, 12)
    zeroed = copy.deepcopy(model)
    data = {"input_ids": ids} if calibrated else None
    rows = prune_heads(model, 0.5, calibrate=data)
    assert [(row.before, row.after) for row in rows] == [(4, 2)] * 2
    for row in rows:
        attention = zeroed.get_submodule(row.path)
        with torch.no_grad():
            for group in set(range(4)) - set(row.kept):
                attention.o_proj.weight[:, group * 16 : group * 16 + 16] = 0
    assert torch.allclose(model(ids).logits, zeroed(ids).logits, atol=1e-5)
    assert count(model) < count(zeroed)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    fresh = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_bert_shrinks_both_ways_and_trains():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    model, ids = transformers.BertModel(config).eval(), torch.arange(12).view(1, 12)
    zeroed = copy.deepcopy(model)
    heads, channels = prune_heads(model, 0.5), prune_channels(model, 0.5)
    assert [row.after for row in (*heads, *channels)] == [2, 2, 32, 32]
    with torch.no_grad():
        for row in heads:
            output = zeroed.get_submodule(row.path).output.dense
            for head in set(range(4)) - set(row.kept):
                output.weight[:, head * 8 : head * 8 + 8] = 0
        for row in channels:
            gone = sorted(set(range(64)) - set(row.kept))
            zeroed.get_submodule(row.path).output.dense.weight[:, gone] = 0
    found = model(input_ids=ids).last_hidden_state
    assert torch.allclose(found, zeroed(input_ids=ids).last_hidden_state, atol=1e-5)
    found.square().mean().backward()
    assert all(p.grad is not None for n, p in model.encoder.named_parameters())


FAMILIES = {  # a model, its last projections of feed-forward blocks and of attention
    "GPT2": (
        {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "c_proj", "c_proj", "n_inner",
    ),
    "DistilBert": (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 32},
        "lin2", "out_lin", None,
    ),
    "Phi3": (
        {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 128, "pad_token_id": 0,
        },
        "down_proj", None, "intermediate_size",
    ),
    "T5Encoder": (
        {"d_model": 32, "d_kv": 8, "num_layers": 2, "num_heads": 4, "d_ff": 128},
        "wo", None, "d_ff",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_other_names_and_fused_ones(family):
    """Again the larger model with zeros in the same places."""
    transformers = pytest.importorskip("transformers")
    options, down, out, width = FAMILIES[family]
    config = getattr(transformers, family.removesuffix("Encoder") + "Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config(vocab_size=64, **options)).eval()
    zeroed, ids = copy.deepcopy(model), torch.arange(12).view(1, 12)
    rows = [(row, down, 1) for row in prune_channels(model, 0.25)]
    assert [(row.before, row.after) for row, *_ in rows] == [(128, 96)] * 2
    if out:
        heads = prune_heads(model, 0.5, calibrate={"input_ids": ids})
        assert [(row.before, row.after) for row in heads] == [(4, 2)] * 2
        rows += [(row, out, 8) for row in heads]
    else:
        with pytest.raises(ValueError, match="model: expected blocks"):
            prune_heads(model, 0.5)
    for row, name, size in rows:
        last = zeroed.get_submodule(row.path).get_submodule(name)
        weight = last.weight if isinstance(last, nn.Linear) else last.weight.t()
        with torch.no_grad():
            for i in set(range(row.before)) - set(row.kept):
                weight[:, i * size : (i + 1) * size] = 0
    found, wanted = (m(input_ids=ids).last_hidden_state for m in (model, zeroed))
    assert torch.allclose(found, wanted, atol=1e-5) and count(model) < count(zeroed)
    assert width is None or getattr(model.config, width) == 96
    found.square().mean().backward()


def test_torchs_own_blocks_lose_channels():
    block = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).train()
    assert prune_channels(block, 0.75)[0].after == 16
    assert block(torch.randn(2, 5, 16)).shape == (2, 5, 16)
