"""Attention of whole models, swapped: called, the same answers, nothing else touched."""

import copy
import pickle

import pytest
import torch
from swap_models import CAUSAL, build
from torch import nn

import fastllm.swap

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


@pytest.fixture
def calls(monkeypatch):
    real, seen = fastllm.functional.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        if kwargs.get("backend") != "reference":  # the proof's
            seen.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(fastllm.functional, "scaled_dot_product_attention", counted)
    return seen


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **CAUSAL, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=6,
        experts_implementation="eager",
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "sinks" in name:
                p.normal_()
    return model


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    size = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 99}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**size, **heads, **layers))


def windowed(name, implementation):
    import transformers

    config = getattr(transformers, f"{name}Config")(**CAUSAL, sliding_window=6)
    config._attn_implementation = implementation
    return getattr(transformers, f"{name}ForCausalLM")(config)


MODELS = {
    "llama": lambda: build("llama")[0],
    "mistral": lambda: windowed("Mistral", "sdpa"),
    "gemma2": lambda: windowed("Gemma2", "eager"),
    "gpt2": lambda: build("gpt2")[0],
    "gpt-oss": gpt_oss,
    "t5": lambda: build("t5")[0],
    "bart": bart,
}
IDS = torch.arange(26).reshape(2, 13) * 7 % 96 + 3
SEEN = (torch.arange(13) >= torch.tensor([0, 5])[:, None]).long()  # padded on the left


def greedy(model, **more):
    return model.generate(
        IDS,
        attention_mask=SEEN,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **more,
    )


@pytest.mark.parametrize("name", MODELS)
def test_generate_gives_the_same_tokens(name, calls):
    model = MODELS[name]().eval()
    right = greedy(model, output_scores=True, return_dict_in_generate=True)
    assert not calls
    with fastllm.swap(model, include=is_attention) as handle:
        assert handle.report().count("attention function") == len(handle.modules) > 0, str(handle)
        found = greedy(model, output_scores=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, right.sequences)
    for a, b in zip(found.scores, right.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    count = len(calls)
    assert count > 6, "prefill and six tokens"
    greedy(model)
    assert len(calls) == count, "restored"


def is_attention(path, m):
    return "attention" in type(m).__name__.lower()


@pytest.mark.parametrize("name", ["gpt-oss", "bart", "mistral", "gemma2"])
def test_verified(name, calls):
    model = MODELS[name]().train()
    inputs = {"input_ids": IDS, "attention_mask": SEEN.flip(-1)}
    if name == "bart":
        inputs["decoder_input_ids"] = IDS[:, :5]
    handle = fastllm.swap(model, include=is_attention, verify=inputs)
    report = handle.report()
    assert report.notes[0].startswith("verified outputs and gradients"), str(report)
    assert report.count("attention function") and not report.left and calls, str(report)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders(name, calls):
    model, inputs = build(name)
    model.eval()
    if name == "bert":
        inputs["attention_mask"] = (torch.arange(11) < torch.tensor([[11], [4]])).long()
    right = model(**inputs).logits
    with fastllm.swap(model, include=is_attention):
        torch.testing.assert_close(model(**inputs).logits, right, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_only_this_instance(calls):
    model, inputs = build("llama")
    other = type(model)(model.config)  # shares the very config
    before = copy.deepcopy(vars(model.config))
    handle = fastllm.swap(model, include=is_attention)
    assert vars(model.config) == before and model.config is other.config
    other(**inputs)
    assert not calls
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.restore()
    model(**inputs)
    assert not calls
    right = model(**inputs).logits
    for again in (twin, loaded):
        torch.testing.assert_close(again(**inputs).logits, right, rtol=1e-4, atol=1e-5)
        assert calls
        calls.clear()


def test_the_config_is_still_obeyed(calls):
    from transformers import AttentionInterface

    model, inputs = build("llama")
    right = model(**inputs).logits
    handle = fastllm.swap(model, include=is_attention)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits, right, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2, "the eager function was proven, too"
    seen = []

    def mine(m, query, key, value, mask, **options):
        seen.append(1)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("of the user", mine)
    model.set_attn_implementation("of the user")
    model(**inputs)
    assert len(seen) == 2 and len(calls) == 2
    handle.restore()


def test_asked_for_weights_it_is_stocks(calls):
    model, inputs = build("bert")
    model.set_attn_implementation("eager")
    model.eval()
    right = model(**inputs, output_attentions=True)
    with fastllm.swap(model, include=is_attention):
        found = model(**inputs, output_attentions=True)
        assert not calls and len(found.attentions) == 2
        assert all(map(torch.equal, found.attentions, right.attentions))
        model(**inputs)
        assert len(calls) == 2


def test_an_eager_function_that_is_another_is_left_alone(monkeypatch):
    from transformers.models.llama import modeling_llama

    real = modeling_llama.eager_attention_forward

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
        out, weights = real(module, query, key, value, attention_mask, scaling, **kwargs)
        return out * 1.1, weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    model, _ = build("llama")
    model.set_attn_implementation("eager")
    handle = fastllm.swap(model, include=is_attention)
    assert handle.report().count("attention function") == 0
    reasons = [row.reason for row in handle.report().left]
    assert reasons == ["attention not fused: its eager function computes something else"] * 2


@pytest.mark.parametrize("name", ["Mistral", "Gemma2"])
def test_by_name(name, calls):
    import fastllm.swap.attention

    fastllm.swap.attention.register()
    model = windowed(name, "eager").eval()
    inputs = {"input_ids": IDS, "attention_mask": SEEN}
    right = model(**inputs).logits
    model.set_attn_implementation("fastllm")
    real = SEEN.bool()
    torch.testing.assert_close(model(**inputs).logits[real], right[real], rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


def test_dropout_in_training(calls):
    model, inputs = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with fastllm.swap(model, include=is_attention):
        one, two = model(**inputs).logits, model(**inputs).logits
        assert len(calls) == 4 and not torch.equal(one, two)
        assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)


def test_compiled():
    model, inputs = build("llama")
    right = model(**inputs).logits
    with fastllm.swap(model, include=is_attention):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_encoder_layer(calls):
    """torch's encoder calls its attention in training; in eval its own fused layer runs."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x, hidden = torch.randn(2, 9, 32), torch.arange(9) >= torch.tensor([[9], [4]])
    right = layer(x, src_key_padding_mask=hidden)
    handle = fastllm.swap(layer, include=is_attention)
    assert handle.report().count("attention") == 1
    torch.testing.assert_close(layer(x, src_key_padding_mask=hidden), right)
    assert len(calls) == 1
    assert isinstance(layer.self_attn, nn.MultiheadAttention)
    with torch.no_grad():
        torch.testing.assert_close(
            layer.eval()(x, src_key_padding_mask=hidden)[0], right[0], rtol=1e-4, atol=1e-5
        )
    handle.restore()
    assert type(layer.self_attn) is nn.MultiheadAttention


def test_attention_with_added_keys_is_left_alone():
    mha = nn.Sequential(nn.MultiheadAttention(32, 4, add_zero_attn=True))
    (row,) = (r for r in fastllm.swap(mha).report() if r.kind == "attention")
    assert "adds keys of its own" in row.reason
