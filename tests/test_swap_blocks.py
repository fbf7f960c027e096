"""Linears, activations, feed-forward blocks, rotations: what is recognized, and what is not."""

import copy
import pickle
import re

import pytest
import torch
from swap_models import build
from torch import nn
from torch.nn import functional as stock

import fastllm.functional
import fastllm.swap
from fastllm.nn import worth
from fastllm.swap.blocks import Finder

transformers = pytest.importorskip("transformers")
ACT2FN = transformers.activations.ACT2FN
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)


class Parts(nn.Module):
    """A gated block; subclasses differ in forward only."""

    def __init__(self, act="silu"):
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down, self.act, self.drop = nn.Linear(24, 16), ACT2FN[act], nn.Dropout(0.0)

    def forward(self, x):
        return self.down(self.drop(self.act(self.gate(x)) * self.up(x)))


class Reversed(Parts):
    def forward(self, x):
        return self.drop(self.down(self.gate(x) * self.act(self.up(x))))


class Packed(nn.Module):
    def __init__(self, act="gelu"):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(16, 48), nn.Linear(24, 16), ACT2FN[act]

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Plain(nn.Module):
    def __init__(self, act="gelu_new", between=24):
        super().__init__()
        self.one, self.two, self.act = nn.Linear(16, between), nn.Linear(between, 16), ACT2FN[act]

    def forward(self, hidden):
        return self.two(self.act(self.one(hidden)))


class Swapped(Plain):
    def forward(self, hidden):
        return self.one(self.act(self.two(hidden)))


class Half(Plain):
    def __init__(self):
        super().__init__()
        del self.two

    def forward(self, hidden):
        return self.act(self.one(hidden))


def results(module, x=X):
    x = x.clone().requires_grad_()
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, upstream)]


def close(one, other):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, other, strict=True))


RECOGNIZED = [
    (Parts(), "gated", ("gate", "up")),
    (Parts("gelu"), "gated", ("gate", "up")),
    (Parts("relu2"), "gated", ("gate", "up")),
    (Parts("relu"), "gated", ("gate", "up")),
    (Reversed("gelu_pytorch_tanh"), "gated", ("up", "gate")),
    (Packed(), "packed", ("both",)),
    (Packed("silu"), "packed", ("both",)),
    (Plain(), "plain", ("one",)),
    (Plain("relu", 16), "plain", ("one",)),
    (Swapped("silu", 16), "plain", ("two",)),
    (Half(), "half", ("one",)),
]


@pytest.mark.parametrize(("module", "kind", "inner"), RECOGNIZED)
def test_feed_forward_is_recognized(module, kind, inner):
    before = [(type(m), [(k, id(v)) for k, v in vars(m).items()]) for m in module.modules()]
    expected = results(module)
    with fastllm.swap(module, verify=X) as handle:
        recipe = type(module)._fastllm_recipe
        assert (recipe.kind, recipe.inner) == (kind, inner), str(handle)
        assert handle.report().count("MLP") == 1 and not handle.report().left, str(handle)
        assert close(results(module), expected)
        twin = pickle.loads(pickle.dumps(module))
        assert type(twin) is type(module) and close(results(twin), expected)
        argument = "hidden" if isinstance(module, Plain) else "x"
        assert torch.equal(module(**{argument: X}), module(X))
    after = [(type(m), [(k, id(v)) for k, v in vars(m).items()]) for m in module.modules()]
    assert before == after and all(map(torch.equal, results(module), expected))


class Skip(Parts):
    def forward(self, x):
        return x + super().forward(x)


class Scaled(Parts):
    def forward(self, x):
        return 1.001 * super().forward(x)


class UpFirst(Packed):
    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class Clamped(Parts):
    def forward(self, x):
        gate = self.gate(x).clamp(max=0.5)
        return self.down(self.act(gate) * self.up(x))


class Stopped(Parts):
    def forward(self, x):
        return self.down(self.act(self.gate(x)).detach() * self.up(x))


class Random(Parts):
    def forward(self, x):
        y = self.act(self.gate(x)) * self.up(x)
        return self.down(stock.dropout(y, 0.1, self.training))


class Counting(Parts):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Twice(Parts):
    def forward(self, x, more=None):
        return super().forward(x)


class Chunked(Parts):
    chunk_size_feed_forward = 2


class Pair(Parts):
    def forward(self, x):
        return super().forward(x), None


LEFT = [
    (Skip(), "computes what it computes"),
    (Scaled(), "computes what it computes"),
    (UpFirst(), "computes what it computes"),
    (Clamped(), "computes what it computes"),
    (Stopped(), "stand-ins|computes what it computes"),
    (Random(), "computes what it computes"),
    (Counting(), "it changes the module"),
    (Twice(), "more than one argument"),
    (Chunked(), "in chunks"),
    (Pair(), "does not return one tensor"),
]


@pytest.mark.parametrize(("module", "reason"), LEFT)
def test_other_blocks_are_left_with_the_reason(module, reason):
    cls, keys = type(module), list(vars(module))
    report = fastllm.swap(module).report()
    assert type(module) is cls and list(vars(module)) == keys
    (row,) = [row for row in report.left if row.path == ""]
    assert row.reason.startswith("MLP not fused") and re.search(reason, row.reason), row.reason
    assert report.count("linear") == len([m for m in module.modules() if isinstance(m, nn.Linear)])


@pytest.mark.parametrize("act", ["quick_gelu", "mish", "gelu_10", "laplace"])
def test_unknown_activation_keeps_its_block(act):
    module = Parts(act)
    report = fastllm.swap(module, verify=X).report()
    assert type(module) is Parts and report.count("linear") == 3
    assert [row.path for row in report.left] == ["act"]


def test_large_blocks_cost_no_more_to_probe():
    with torch.device("meta"):
        module = transformers.models.llama.modeling_llama.LlamaMLP(transformers.LlamaConfig())
    found = Finder(set(), set(), None)
    fastllm.swap(module)
    assert type(module)._fastllm_recipe.kind == "gated" and not found.known


@pytest.mark.parametrize("name", ["gate", "up", "down", "act", "drop"])
def test_hooks_inside_are_heard(name):
    module, heard = Parts(), []
    hook = getattr(module, name).register_forward_hook(lambda *a: heard.append(1))
    expected = results(module)
    fastllm.swap(module)
    assert not heard[1:], "probing runs no hooks"
    assert close(results(module), expected) and len(heard) == 2
    hook.remove()
    assert close(results(module), expected) and len(heard) == 2


def test_projection_replaced_later_is_called():
    class Zero(nn.Module):
        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], 24)

    module = Parts()
    fastllm.swap(module)
    module.gate = Zero()
    assert torch.allclose(module(X), module.down.bias.expand(3, 5, 16))


def test_excluded_activation_leaves_the_block():
    module = Parts()
    report = fastllm.swap(module, exclude="act").report()
    assert type(module) is Parts and report.count("linear") == 3 and not report.left


def test_lora_on_projections():
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    config = peft.LoraConfig(r=4, target_modules=["up_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    expected = wrapped(**inputs).logits
    handle = fastllm.swap(wrapped)
    report = handle.report()
    assert report.count("MLP") == 2
    adapted = [row for row in report.left if row.reason == "an adapter wraps it"]
    assert len(adapted) == 2 * 2 * 3, "the base and its two adapters, left as they are"
    found = wrapped(**inputs).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    trained = [p for n, p in wrapped.named_parameters() if "lora_" in n]
    assert trained and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    handle.restore()
    assert torch.equal(wrapped(**inputs).logits, expected)


class Subclass(nn.Linear):
    pass


class Weight(nn.Parameter):
    pass


def test_other_linears_are_left_with_the_reason():
    model = nn.Sequential(Subclass(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4))
    model[1].weight = Weight(torch.randn(4, 4))
    torch.nn.utils.parametrizations.weight_norm(model[2])
    model[3] = nn.Embedding(5, 4, max_norm=1.0)
    report = fastllm.swap(model).report()
    assert not report.swapped
    assert {row.path: row.reason for row in report.left if len(row.path) == 1} == {
        "0": "a subclass with a forward of its own",
        "1": "its weight is a Weight",
        "2": "a subclass with a forward of its own",
        "3": "it renormalizes its weight (max_norm)",
    }


def test_projections_inside_of_torchs_attention_are_none_of_ours():
    model = nn.MultiheadAttention(8, 2)
    assert [row.kind for row in fastllm.swap(model).report().rows] == ["attention"]


def test_tied_weights_stay_tied():
    model, inputs = build("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    with fastllm.swap(model):
        assert model.lm_head.weight is model.transformer.wte.weight
        model(**inputs).logits.sum().backward()
        assert model.lm_head.weight.grad is model.transformer.wte.weight.grad


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x @ self.weight + self.bias


class Off(Conv):
    def forward(self, x):
        return x @ self.weight - self.bias


def test_transposed_linear_by_what_it_computes():
    module = Conv()
    expected = results(module)
    with fastllm.swap(module, verify=X) as handle:
        assert handle.report().count("linear") == 1
        assert close(results(module), expected)
    (row,) = fastllm.swap(Off()).report().left
    assert row.reason == "it does not compute x @ weight + bias"


def test_dtypes_may_change_after_the_swap():
    module = Parts()
    fastllm.swap(module)
    module.bfloat16()
    assert module(X.bfloat16()).dtype == torch.bfloat16
    module.down.float()  # as T5 keeps it
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        module(X.bfloat16())


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_rotation_in_this_instance_only(name, monkeypatch):
    model, inputs = build(name)
    other = copy.deepcopy(model).eval()
    module = __import__(type(model).__module__, fromlist=["x"])
    function = module.apply_rotary_pos_emb
    calls = []
    real = fastllm.functional.rotary_embedding
    monkeypatch.setattr(
        fastllm.functional, "rotary_embedding", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    model.eval()
    expected = model(**inputs).logits
    with fastllm.swap(model):
        assert torch.allclose(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(calls) == 2 and module.apply_rotary_pos_emb is function
        assert torch.equal(other(**inputs).logits, expected) and len(calls) == 2
        monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *a: (q, k))
        changed = model(**inputs).logits
        assert len(calls) == 2, "what somebody put in its place is what runs"
        assert torch.equal(changed, model(**inputs).logits)
    assert torch.allclose(model(**inputs).logits, changed, rtol=1e-4, atol=1e-5)


def _layout(name):
    from importlib import import_module

    from fastllm.swap import rotary

    module = import_module(f"transformers.models.{name}.modeling_{name}")
    return rotary.layout(module.apply_rotary_pos_emb)


@pytest.mark.parametrize(
    ("name", "interleaved", "partial"),
    [("llama", False, False), ("gpt_neox", False, True), ("cohere", True, False)],
)
def test_layout_of_a_rotation(name, interleaved, partial):
    found = _layout(name)
    assert (found.interleaved, found.partial) == (interleaved, partial)


def test_unknown_rotation():
    assert _layout("glm") is None  # pairs side by side, angles half a head apart


def test_wrong_block_is_put_back(monkeypatch):
    real = fastllm.functional.gated_linear
    module = nn.Sequential(Parts(), Parts())
    before = [type(m) for m in module.modules()]

    def wrong(x, *args, **kwargs):
        return real(x, *args, **kwargs) * (1.001 if x.shape[-1] == 16 else 1.0)

    monkeypatch.setattr(fastllm.functional, "gated_linear", wrong)
    report = fastllm.swap(module, verify=X).report()
    assert "the fused blocks were put back" in report.notes[0]
    assert type(module[0]) is before[1] and report.count("linear") == 6


def test_small_inputs_run_the_original(monkeypatch):
    module = Parts()
    fastllm.swap(module)
    monkeypatch.setattr(worth, "PASS", 1 << 15)
    monkeypatch.setattr(fastllm.functional, "gated_linear", None)
    assert module(X).shape == X.shape
    with pytest.raises(TypeError):
        module(torch.randn(1 << 12, 16))
