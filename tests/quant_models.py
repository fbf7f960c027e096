"""Models that are quantized in tests."""

import pytest
import torch
from torch import nn

NAMES = ("int8", "int8_weight", "int4", "int4_asym_g32", "nf4", "nf4_double", "fp8", "mxfp8")


class Net(nn.Module):
    def __init__(self, width=48, bias=True):
        super().__init__()
        self.up, self.act = nn.Linear(width, 3 * width, bias=bias), nn.GELU()
        self.down, self.norm = nn.Linear(3 * width, width, bias=bias), nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.down(self.act(self.up(x))))


def llama(tied=False, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def states_equal(a, b):
    """Bytes, since NaN is not itself and not every dtype compares."""
    if list(a) != list(b):
        return False
    views = (
        (x.contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8))
        for n, x in a.items()
        if x.dim()
    )
    return all(torch.equal(x, y) for x, y in views)
