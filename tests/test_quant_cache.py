"""Quantized key/value caches: in attention_with_kv_cache's place, and as a transformers cache."""

import copy

import pytest
import torch

from fastllm.functional import attention_with_kv_cache
from fastllm.quant import QuantizedKVCache, quantize

FORMATS = ("int8", "int4_asym_g32", "fp8", "int8_g32")


def states(t, b=2, g=2, d=64, dtype=torch.float32):
    return torch.randn(b, g, t, d).to(dtype), torch.randn(b, g, t, d).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_that_of_the_dequantized_cache(name, dtype):
    """A prompt, then steps."""
    cache = QuantizedKVCache(name)
    keys, values = [], []
    for t in (37, 1, 1, 5, 1):
        k, v = states(t, dtype=dtype)
        query = torch.randn(2, 4, t, 64).to(dtype)
        found = cache.attend(query, k, v)
        keys.append(quantize(k, name).dequantize())
        values.append(quantize(v, name).dequantize())
        whole = torch.cat(keys, 2), torch.cat(values, 2)
        used = torch.full((2,), whole[0].shape[2], dtype=torch.int32)
        wanted = attention_with_kv_cache(query, *whole, used)
        eps = torch.finfo(dtype).eps
        assert (found - wanted).abs().max() <= 8 * eps
    assert len(cache) == 45
    assert torch.equal(cache.keys.read(dtype=dtype), whole[0])
    small = {"int8": 0.27, "fp8": 0.27, "int4_asym_g32": 0.17, "int8_g32": 0.29}[name]
    assert cache.nbytes <= small * 4 * (whole[0].numel() + whole[1].numel())


def test_quality_of_an_int8_cache():
    k, v = states(300)
    query = torch.randn(2, 4, 1, 64)
    used = torch.full((2,), 300, dtype=torch.int32)
    exact = attention_with_kv_cache(query, k, v, used)
    for name, most in (("int8", 0.01), ("int4_asym_g32", 0.12)):
        found = QuantizedKVCache(name).attend(query, k, v)
        assert (found - exact).norm() <= most * exact.norm()


def test_windows_sinks_and_softcap():
    k, v = states(50)
    cache = QuantizedKVCache("int8")
    cache.append(k, v)
    whole = cache.keys.read(), cache.values.read()
    used = torch.full((2,), 50, dtype=torch.int32)
    query = torch.randn(2, 4, 1, 64)
    for options in (
        {"window": (7, 0)},
        {"softcap": 5.0},
        {"sinks": torch.randn(4)},
        {"scale": 0.3},
    ):
        wanted = attention_with_kv_cache(query, *whole, used, **options)
        torch.testing.assert_close(cache.attend(query, **options), wanted)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4_row", "int4_asym_g32", "fp8"])
def test_a_cache_of_codes_takes_new_tokens(name, paged):
    """What is written is what quantize makes; attention to it, that to the numbers."""
    shape, table, page = (2, 2, 96, 64), None, 32
    if paged:
        shape, table = (6, 2, page, 64), torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int32)
    k_cache, v_cache = (quantize(torch.randn(shape), name) for _ in range(2))
    plain = [x.dequantize() for x in (k_cache, v_cache)]
    used = torch.tensor([31, 60], dtype=torch.int32)
    k, v = states(3)
    query = torch.randn(2, 4, 3, 64)
    given = {"block_table": table, "k": k, "v": v}
    found = attention_with_kv_cache(query, k_cache, v_cache, used, **given)
    given.update({n: quantize(given[n], name).dequantize() for n in "kv"})
    wanted = attention_with_kv_cache(query, *plain, used, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)
    for x, numbers in zip((k_cache, v_cache), plain, strict=True):
        assert torch.equal(x.dequantize(), numbers)


def test_bad_caches_of_codes_are_named():
    k, v = states(40)
    query, used = torch.randn(2, 4, 1, 64), torch.tensor([40, 3], dtype=torch.int32)
    good = quantize(k, "int8")

    def refused(error, match, *caches, **options):
        with pytest.raises(error, match=match):
            attention_with_kv_cache(query, *caches, used, **options)

    refused(TypeError, "as k_cache is; found QTensor and Tensor", good, v)
    refused(TypeError, "v_cache: expected a Tensor or a QTensor, found NoneType", good, None)
    refused(ValueError, "v_cache: expected groups within a token", good, quantize(v, "int8_tensor"))
    refused(ValueError, "k_cache: expected scales that are", quantize(k, "nf4_double"), good)
    refused(
        ValueError, r"k_cache: expected \[2, G, S_max, 64\]", quantize(k[..., :32], "int8"), good
    )
    refused(TypeError, "k: expected the cache's torch.float32", good, good, k=k.half(), v=v)
    before = good.codes.clone()
    refused(ValueError, "cache_seqlens: expected 0 to 39", good, good, k=k[:, :, :1], v=v[:, :, :1])
    assert torch.equal(good.codes, before)


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="format: expected groups within a token"):
        QuantizedKVCache("int8_tensor")
    cache = QuantizedKVCache("int8")
    k, v = states(3)
    with pytest.raises(ValueError, match=r"states: expected a Tensor \[B, G, T, D\]"):
        cache.append(k[0], v)
    cache.append(k, v)
    with pytest.raises(ValueError, match="states: expected"):
        cache.append(k[:, :1], v)
    with pytest.raises(ValueError, match="k: expected keys and values for a cache that is empty"):
        QuantizedKVCache().attend(torch.randn(2, 2, 1, 64))
    with pytest.raises(ValueError, match="v: expected with k"):
        cache.attend(torch.randn(2, 2, 1, 64), k)
    with pytest.raises(ValueError, match="start, stop: expected 0 to 3"):
        cache.keys.read(0, 4)
    assert len(cache) == 3


# ---- transformers


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_model_generates_with_it(llama):
    from fastllm.quant import QuantizedCache

    prompt = torch.randint(0, 97, (2, 20))
    for name, most in (("int8", 0.02), ("int4_asym_g32", 0.3)):
        cache = QuantizedCache(name)
        logits = llama(prompt, past_key_values=cache).logits
        exact = llama(prompt).logits
        assert cache.get_seq_length() == 20
        assert (logits - exact).norm() <= most * exact.norm()
        plain = sum(layer.cache.keys.read().nbytes * 2 for layer in cache.layers)
        assert cache.nbytes < 0.3 * plain
    out = llama.generate(
        prompt, past_key_values=QuantizedCache("int8"), max_new_tokens=8, do_sample=False
    )
    assert out.shape == (2, 28)


@torch.no_grad()
@pytest.mark.parametrize("name", ["int8", "int4_asym_g32"])
def test_attention_by_fastllm_reads_the_codes(llama, name, monkeypatch):
    import fastllm
    from fastllm.ops.attention import kv_cache
    from fastllm.quant import QuantizedCache

    prompt = torch.randint(0, 97, (2, 20))
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = llama.generate(prompt, past_key_values=QuantizedCache(name), **options)
    calls = []
    real = kv_cache.attention_quantized_op
    monkeypatch.setattr(
        kv_cache,
        "attention_quantized_op",
        lambda *a, **k: calls.append(a[0].shape) or real(*a, **k),
    )
    with fastllm.swap(llama):
        found = llama.generate(prompt, past_key_values=QuantizedCache(name), **options)
    assert torch.equal(found, wanted)
    assert len(calls) == 5 * 2  # each step but the prompt's, each layer


@torch.no_grad()
def test_chunks_of_a_prompt_change_nothing(llama):
    from fastllm.quant import QuantizedCache

    prompt = torch.randint(0, 97, (1, 24))
    whole = llama(prompt, past_key_values=QuantizedCache("int8")).logits[:, -1]
    cache = QuantizedCache("int8")
    for piece in prompt.split(7, 1):
        last = llama(piece, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(last, whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_beams_crop_and_reset(llama):
    from fastllm.quant import QuantizedCache

    prompt = torch.randint(0, 97, (2, 9))
    beams = llama.generate(
        prompt,
        past_key_values=QuantizedCache("int8"),
        max_new_tokens=5,
        num_beams=3,
        do_sample=False,
    )
    assert beams.shape == (2, 14)
    cache = QuantizedCache("int8")
    llama(prompt, past_key_values=cache)
    before = cache.layers[0].cache.keys.read()
    again = copy.deepcopy(cache)
    again.crop(-4)
    assert again.get_seq_length() == 5
    assert torch.equal(again.layers[0].cache.keys.read(), before[:, :, :5])
    again = copy.deepcopy(cache)
    again.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(again.layers[1].cache.keys.read()[0], cache.layers[1].cache.keys.read()[1])
    again.batch_repeat_interleave(2)
    assert again.layers[0].cache.keys.read().shape[0] == 4
    again.batch_select_indices(torch.tensor([True, False, False, True]))
    assert again.layers[0].cache.keys.read().shape[0] == 2
    again.reset()
    assert again.get_seq_length() == 0
    llama(prompt[:1], past_key_values=again)  # another batch size
    assert again.get_seq_length() == 9
