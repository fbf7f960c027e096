"""swap(unpad=True): the same at every real token, zeros at padding, and the old way otherwise."""

import pytest
import torch
from swap_models import CAUSAL, build
from torch import nn

import fastllm
from fastllm.swap import unpad

transformers = pytest.importorskip("transformers")

IDS = torch.arange(33).reshape(3, 11) * 7 % 96 + 3
SEEN = (torch.arange(11) < torch.tensor([[11], [4], [1]])).long()
SEEN[1] = SEEN[1].flip(0)  # padded on the left


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture
def packed(monkeypatch):
    """How many tokens each call of attention_varlen was given, in fp32: the proof's are fp64."""
    real, seen = fastllm.functional.attention_varlen, []

    def counted(query, *args, **kwargs):
        if query.dtype == torch.float32:
            seen.append(len(query))
        return real(query, *args, **kwargs)

    monkeypatch.setattr(fastllm.functional, "attention_varlen", counted)
    return seen


def roberta():
    wanted = {k: v for k, v in CAUSAL.items() if k != "num_key_value_heads"}
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**wanted))


def eager_bert():
    model = build("bert")[0]
    model.config._attn_implementation = "eager"
    return model


MODELS = {
    "bert": lambda: build("bert")[0],
    "distilbert": lambda: build("distilbert")[0],
    "roberta": roberta,
    "eager bert": eager_bert,
}


def run(model, seen=SEEN, **more):
    return model(input_ids=IDS, attention_mask=seen, **more)


def slopes(model):
    """Gradients of what only real tokens say."""
    upstream = torch.randn(3, 11, 99, generator=torch.Generator().manual_seed(1)) * SEEN[..., None]
    wanted = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(run(model).logits, wanted, upstream, allow_unused=True)


@pytest.mark.parametrize("name", MODELS)
def test_real_tokens_are_the_same(name, packed):
    model = MODELS[name]().eval()
    right, steep = run(model).logits, slopes(model)
    with fastllm.swap(model, unpad=True) as handle:
        rows = [row for row in handle.report().rows if row.kind == unpad.KIND]
        assert len(rows) == 1 and not rows[0].reason, str(handle)
        found = run(model)
        assert packed == [16, 16], "both layers, without padding"
        real = SEEN.bool()
        torch.testing.assert_close(found.logits[real], right[real], rtol=1e-4, atol=1e-5)
        for a, b in zip(slopes(model), steep, strict=True):
            if b is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        stack = handle.model.get_submodule(rows[0].path)
        hidden = torch.randn(3, 11, 32)
        mask = real[:, None, None]
        if name == "eager bert":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        out = stack(hidden, attention_mask=mask).last_hidden_state
        assert not out[~real].any() and out[real].all()
    count = len(packed)
    torch.testing.assert_close(run(model).logits, right, rtol=0, atol=0)
    assert len(packed) == count, "restored"


def test_half_precision_and_training(packed):
    model = build("bert")[0].to(torch.bfloat16).train()
    with fastllm.swap(model, unpad=True) as handle:
        assert handle.report().count(unpad.KIND) == 1, str(handle)
        out = run(model, labels=IDS.masked_fill(SEEN == 0, -100))
        out.loss.backward()
        assert out.loss.isfinite() and all(
            p.grad is None or p.grad.isfinite().all() for p in model.parameters()
        )


@pytest.mark.parametrize("why", ["no padding", "hidden states", "weights", "hook", "empty"])
def test_other_calls_go_the_old_way(why, packed):
    model = build("bert")[0].eval()
    seen, more = SEEN, {}
    if why == "no padding":
        seen = torch.ones_like(SEEN)
    elif why == "empty":
        seen = SEEN.clone()
        seen[2] = 0
    elif why in ("hidden states", "weights"):
        more = {f"output_{'attentions' if why == 'weights' else 'hidden_states'}": True}
        if why == "weights":
            model.set_attn_implementation("eager")
    right = run(model, seen, **more)
    heard = []
    with fastllm.swap(model, unpad=True):
        if why == "hook":
            layer = model.bert.encoder.layer[0]
            layer.register_forward_hook(lambda m, a, out: heard.append(out.shape))
        found = run(model, seen, **more)
        assert not packed
        torch.testing.assert_close(found.logits, right.logits, rtol=1e-4, atol=1e-5)
        for name in ("hidden_states", "attentions"):
            for a, b in zip(found.get(name) or (), right.get(name) or (), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert heard == ([(3, 11, 32)] if why == "hook" else [])
        if why in ("hidden states", "weights"):  # recorders stay behind, and sleep
            run(model)
            assert packed


def test_compiled():
    model = build("bert")[0].eval()
    right = run(model).logits
    with fastllm.swap(model, unpad=True), torch.no_grad():
        found = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(found).logits, right, rtol=1e-4, atol=1e-5)


class Neighbours(nn.Module):
    """Adds to each token the one before it."""

    def __init__(self, dense):
        super().__init__()
        self.dense = dense

    def forward(self, x):
        return self.dense(x + x.roll(1, -2))


def spoil(model, how):
    for layer in model.bert.encoder.layer:
        if how == "mixes":
            layer.intermediate.dense = Neighbours(layer.intermediate.dense)
        elif how == "batch norm":
            layer.output.dense = nn.Sequential(layer.output.dense, nn.BatchNorm1d(11))
        elif how == "differ":
            layer.intermediate.dense = Neighbours(layer.intermediate.dense)
            return


@pytest.mark.parametrize(
    ("how", "words"),
    [("mixes", "another result"), ("batch norm", "more than one token"), ("differ", "differ")],
)
def test_what_is_not_proven_is_left_alone(how, words, packed):
    model = build("bert")[0].eval()
    spoil(model, how)
    right = run(model).logits
    with fastllm.swap(model, unpad=True) as handle:
        (row,) = (row for row in handle.report().rows if row.kind == unpad.KIND)
        assert words in row.reason, row.reason
        torch.testing.assert_close(run(model).logits, right, rtol=1e-4, atol=1e-5)
    assert not packed


def test_without_an_encoder_it_is_an_error():
    model = build("llama")[0]
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="unpad: expected an encoder"):
        fastllm.swap(model, unpad=True)
    assert [type(m) for m in model.modules()] == before


def test_the_bench_times_what_is_right():
    from fastllm.swap import subjects

    for dtype in (torch.float32, torch.bfloat16):
        assert subjects._wrong(dtype, "cpu") is None
