"""Small random models of the architectures that swap is proven on."""

import functools

import torch
from torch import nn

IDS = {"input_ids": torch.arange(22).reshape(2, 11) * 7 % 99}
# name -> what a swap does to it
EXPECTED = {
    "llama": "5 norms, 15 linears, 1 embedding, 2 activations; fused 2 residual additions, "
    "2 MLPs, 2 rotary embeddings, 2 attention functions",
    "qwen3": "9 norms, 15 linears, 1 embedding, 2 activations; fused 2 residual additions, "
    "2 MLPs, 2 rotary embeddings, 2 attention functions",
    "gemma2": "9 norms, 15 linears, 2 activations; fused 2 residual additions, 2 MLPs, "
    "2 rotary embeddings, 2 attention functions",
    "mistral": "5 norms, 15 linears, 1 embedding, 2 activations; fused 2 residual additions, "
    "2 MLPs, 2 rotary embeddings, 2 attention functions",
    "phi3": "5 norms, 9 linears, 1 embedding, 2 activations; fused 2 residual additions, "
    "2 MLPs, 2 rotary embeddings, 2 attention functions",
    "mixtral": "5 norms, 9 linears, 1 embedding, 2 activations; fused 2 residual additions, "
    "2 mixtures of experts, 2 rotary embeddings, 2 attention functions",
    "gpt2": "5 norms, 9 linears, 2 embeddings, 2 activations; fused 2 residual additions, "
    "2 MLPs, 2 attention functions",
    "bert": "6 norms, 14 linears, 3 embeddings, 3 activations; fused 5 residual additions, "
    "2 MLPs, 2 attention functions",
    "distilbert": "6 norms, 14 linears, 2 embeddings, 3 activations; fused 5 residual additions, "
    "2 MLPs, 2 attention functions",
    "t5": "12 norms, 33 linears, 5 embeddings; fused 4 MLPs, 6 attention functions",
    "t5 gated": "12 norms, 37 linears, 5 embeddings, 4 activations; fused 4 MLPs, "
    "6 attention functions",
    "vit": "5 norms, 13 linears, 2 activations; fused 2 residual additions, 2 MLPs, "
    "2 attention functions",
    "encoder pre-norm": "5 norms, 4 linears, 2 attentions; fused 2 residual additions",
    "encoder pre-norm, batch first": "5 norms, 4 linears, 2 attentions; fused 2 residual additions",
    "encoder post-norm": "4 norms, 4 linears, 2 attentions; fused 4 residual additions",
    "encoder post-norm, batch first": "4 norms, 4 linears, "
    "2 attentions; fused 4 residual additions",
}
CAUSAL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name, dtype=torch.float32, seed=0):
    """(model in training mode with random norms, inputs)."""
    torch.manual_seed(seed)
    model, inputs = _encoder(name) if name.startswith("encoder") else _MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # norms of all ones would hide a wrong weight
                p.add_(torch.randn_like(p) * 0.3)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.to(dtype).train(), inputs


def _causal(name, **extra):
    import transformers

    config = getattr(transformers, f"{name}Config")(**CAUSAL, **extra)
    config._attn_implementation = "eager" if name == "Gemma2" else "sdpa"
    return getattr(transformers, f"{name}ForCausalLM")(config), dict(IDS)


def _mixtral():
    # grouped matrix products have no float64 form, and float64 is the oracle
    return _causal("Mixtral", num_local_experts=4, experts_implementation="eager")


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=99, bos_token_id=1, eos_token_id=2, **size)
    return GPT2LMHeadModel(config), dict(IDS)


def _bert():
    from transformers import BertConfig, BertForMaskedLM

    wanted = {k: v for k, v in CAUSAL.items() if k != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**wanted)), dict(IDS)


def _distilbert():
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    size = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
    config = DistilBertConfig(vocab_size=99, max_position_embeddings=64, **size)
    return DistilBertForMaskedLM(config), dict(IDS)


def _t5(form="relu"):
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=99, decoder_start_token_id=0, feed_forward_proj=form, **size)
    ids = IDS["input_ids"]
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(intermediate_size=48, image_size=16, patch_size=4, **size)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 16, 16)}


def _encoder(name):
    first = "batch first" in name
    pre = "pre-norm" in name
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=first, norm_first=pre)
    last = nn.LayerNorm(32) if pre else None
    encoder = nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=first and not pre)
    with torch.no_grad():  # the layers start as copies of one
        for p in encoder.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return encoder, {"src": torch.randn(2, 7, 32)}


_MODELS = {
    "llama": functools.partial(_causal, "Llama"),
    "qwen3": functools.partial(_causal, "Qwen3", head_dim=8),
    "gemma2": functools.partial(_causal, "Gemma2", head_dim=8),
    "mistral": functools.partial(_causal, "Mistral"),
    "phi3": functools.partial(_causal, "Phi3"),
    "mixtral": _mixtral,
    "gpt2": _gpt2,
    "bert": _bert,
    "distilbert": _distilbert,
    "t5": _t5,
    "t5 gated": functools.partial(_t5, "gated-gelu"),
    "vit": _vit,
}
