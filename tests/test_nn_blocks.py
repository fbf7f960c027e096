"""Modules of a transformer block: torch's answers, Hugging Face's keys, hooks that are heard."""

import pytest
import torch
from torch.nn import functional as stock

import fastllm.functional
from fastllm import nn as fast
from fastllm.core.proof import compare
from fastllm.core.tuner import routes
from fastllm.nn import worth
from fastllm.nn.activation import ACTIVATIONS
from fastllm.ops.matmul import worth as products_worth

ACTS = {
    "gelu": stock.gelu,
    "gelu_tanh": lambda x: stock.gelu(x, approximate="tanh"),
    "silu": stock.silu,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


def plain(module, x):
    """A block's formula with torch alone."""
    act = ACTS[module.activation]
    up = stock.linear(x, module.up_proj.weight, module.up_proj.bias)
    if isinstance(module, fast.GatedMLP):
        up = act(stock.linear(x, module.gate_proj.weight, module.gate_proj.bias)) * up
    else:
        up = act(up)
    return stock.linear(up, module.down_proj.weight, module.down_proj.bias)


def results(forward, module, x):
    x = x.clone().requires_grad_()
    y = forward(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kind", "bias"), [("gated", False), ("gated", True), ("plain", True)])
def test_blocks_against_their_formula(kind, activation, bias, dtype):
    if kind == "gated":
        module = fast.GatedMLP(24, 40, activation, bias, dtype=dtype)
    else:
        module = fast.MLP(24, 40, 16, activation, bias, dtype=dtype)
    x = torch.randn(3, 17, 24).to(dtype)
    mine = results(module, module, x)
    theirs = results(lambda x: plain(module, x), module, x)
    module.double()
    exact = results(lambda x: plain(module, x), module, x.double())
    for each in zip(mine, theirs, exact, strict=True):
        proof = compare("result", *each)
        assert proof.ok, proof.message


def test_keys_are_those_of_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4)
    llama = transformers.models.llama.modeling_llama.LlamaMLP(config)
    ours = fast.GatedMLP(24, 40)
    ours.load_state_dict(llama.state_dict())
    x = torch.randn(5, 24)
    assert torch.allclose(ours(x), llama(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [fast.GatedMLP, fast.MLP])
def test_unknown_activation(make):
    with pytest.raises(ValueError, match=r"activation: expected one of gelu, .* found 'tanh'"):
        make(8, 8, activation="tanh")


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_hooks_are_heard(name):
    module, x = fast.GatedMLP(8, 16), torch.randn(3, 8)
    before = module(x)
    heard = []
    hook = getattr(module, name).register_forward_hook(lambda *a: heard.append(1))
    assert torch.allclose(module(x), before, rtol=1e-5, atol=1e-6) and heard == [1]
    hook.remove()
    module(x)
    assert heard == [1]


def test_replaced_projection_is_called():
    class Double(fast.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = fast.MLP(8, 16, activation="relu"), torch.randn(3, 8)
    twice = Double(8, 16)
    twice.load_state_dict(module.up_proj.state_dict())
    bias, before = module.down_proj.bias, module(x)
    module.up_proj = twice
    assert torch.allclose(module(x), 2 * before - bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: fast.GatedMLP(8, 16), lambda: fast.MLP(8, 16)])
def test_compile_and_autocast(make):
    torch._dynamo.reset()
    module, x = make(), torch.randn(3, 8)
    stock = results(module, module, x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, module, x), stock, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), stock[0], rtol=0.05, atol=0.05)
    torch._dynamo.reset()


def test_products_at_torchs_peak_run_in_torch(monkeypatch, by_size):
    monkeypatch.setattr(fastllm.functional, "linear", None)
    monkeypatch.setattr(products_worth, "SMALL", 1 << 24)
    monkeypatch.setattr(products_worth, "AT_PEAK", frozenset((torch.float32,)))
    monkeypatch.setattr(routes, "lookup", lambda *call: None)  # no table of this machine
    by_size()
    module, x = fast.Linear(64, 64), torch.randn(1 << 12, 64)
    assert torch.equal(module(x), stock.linear(x, module.weight, module.bias))
    thin = fast.Linear(1 << 11, 1 << 10)
    for rows in (1, 5):
        assert thin(torch.randn(rows, 1 << 11)).shape == (rows, 1 << 10)
    with pytest.raises(TypeError):
        thin(torch.randn(2, 1 << 11))
    monkeypatch.setattr(products_worth, "AT_PEAK", frozenset())
    by_size()
    assert torch.equal(module(x[1:]), stock.linear(x[1:], module.weight, module.bias))
    with pytest.raises(TypeError):
        module(x)


@pytest.mark.parametrize("name", ["torch", "onednn"])
def test_what_was_measured_decides(name, monkeypatch, by_size):
    module, x = fast.Linear(64, 64), torch.randn(8, 64)
    at_peak = frozenset(() if name == "torch" else (torch.float32,))
    monkeypatch.setattr(products_worth, "AT_PEAK", at_peak)
    monkeypatch.setattr(routes, "lookup", lambda op, args, device, direction: name)
    by_size()
    assert worth.worth(x, module.weight, module.bias) is (name != "torch")
    assert worth.worth(x, module.weight, module.bias) is (name != "torch")  # remembered


@pytest.mark.parametrize("extra", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding(extra, dtype):
    theirs = torch.nn.Embedding(20, 8, dtype=dtype, **extra)
    ours = fast.Embedding(20, 8, dtype=dtype, **extra)
    assert repr(ours) == repr(theirs) and vars(ours).keys() == vars(theirs).keys()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(20, (4, 50))
    exact = torch.nn.Embedding.from_pretrained(theirs.weight.detach().double(), False, **extra)
    found = []
    for module in (ours, theirs, exact):
        y = module(ids)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        upstream = upstream.to(dtype).to(y.dtype)
        found.append([y.detach(), torch.autograd.grad(y, module.weight, upstream)[0]])
    for each in zip(*found, strict=True):
        assert (proof := compare("result", *each)).ok, proof.message


def test_embedding_without_gradients_is_torchs(monkeypatch):
    module, ids = fast.Embedding(20, 8), torch.randint(20, (4, 50))
    with torch.no_grad():
        rows = module(ids)
    monkeypatch.setattr(fastllm.functional, "embedding", None)
    with torch.no_grad():
        assert torch.equal(module(ids), rows)
    with pytest.raises(TypeError):
        module(ids)
    module.requires_grad_(False)
    assert torch.equal(module(ids), rows)


@pytest.mark.parametrize("extra", [{"sparse": True}, {"max_norm": 1.0}])
def test_embedding_leaves_the_rest_to_torch(extra):
    module = fast.Embedding(20, 8, **extra)
    y = module(torch.tensor([[1, 2, 2]]))
    y.sum().backward()
    assert module.weight.grad.is_sparse == ("sparse" in extra)
    assert "max_norm" not in extra or (y.norm(dim=-1) <= 1.0001).all()


@pytest.mark.parametrize(("interleaved", "dim"), [(False, 8), (True, 8), (False, 4)])
def test_rotary(interleaved, dim):
    module = fast.RotaryEmbedding(dim, 16, interleaved=interleaved)
    assert not module.state_dict()
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8)
    turned, other = module(q, k)
    assert torch.allclose(turned[:, :, 0], q[:, :, 0])
    assert torch.equal(turned[..., dim:], q[..., dim:])
    # a pair is a complex number, turned by position / base^(2 i / dim)
    left = slice(0, dim, 2) if interleaved else slice(0, dim // 2)
    right = slice(1, dim, 2) if interleaved else slice(dim // 2, dim)
    angle = torch.outer(torch.arange(7.0), 10000 ** (-torch.arange(0, dim, 2) / dim))
    wanted = torch.complex(k[..., left], k[..., right]) * torch.polar(torch.ones(()), angle)
    assert torch.allclose(other[..., left], wanted.real, atol=1e-5)
    assert torch.allclose(other[..., right], wanted.imag, atol=1e-5)
    ids = torch.arange(7).flip(0)
    flipped, _ = module(q.flip(2), k.flip(2), position_ids=ids)
    assert torch.allclose(flipped.flip(2), turned, atol=1e-6)


def test_tables_of_rotary_stay_float32():
    module = fast.RotaryEmbedding(8, 16)
    cos = module.cos.clone()
    assert torch.equal(module.bfloat16().cos, cos)
    x = torch.randn(1, 1, 5, 8).bfloat16()
    assert module(x, x)[0].dtype == torch.bfloat16
    with torch.device("meta"):
        lazy = fast.RotaryEmbedding(8, 16)
    assert torch.equal(lazy.to_empty(device="cpu").cos, cos)


def test_bad_rotary():
    with pytest.raises(ValueError, match="dim: expected an even positive number, found 7"):
        fast.RotaryEmbedding(7)
    x = torch.randn(1, 1, 9, 8)
    with pytest.raises(ValueError, match="query: expected at most max_positions = 8 tokens"):
        fast.RotaryEmbedding(8, 8)(x, x)
