"""Norms are known by what they compute: variants are told apart, strangers are left alone."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fastllm.swap
from fastllm.swap import probe


class Base(nn.Module):
    """A weight, an epsilon; subclasses differ in forward only."""

    def __init__(self, size=24, eps=1e-6, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        if bias:
            self.bias = nn.Parameter(torch.zeros(size))
        self.variance_epsilon = eps

    def scaled(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Llama(Base):
    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        return self.weight * self.scaled(hidden_states.float()).to(dtype)


class Gemma(Base):
    def forward(self, x):
        return (self.scaled(x.float()) * (1.0 + self.weight.float())).type_as(x)


class Layer1p(Base):
    def forward(self, x):
        shape, eps = self.weight.shape, self.variance_epsilon
        return F.layer_norm(x, shape, self.weight + 1, getattr(self, "bias", None), eps)


class Naive(Base):
    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.scaled(x) * self.weight + self.bias


class EpsOutside(Base):
    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon) * self.weight


class Unbiased(Base):
    def forward(self, x):
        return (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + self.variance_epsilon).sqrt()


class Detached(Base):
    def forward(self, x):
        with torch.no_grad():
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * scale * self.weight


class Partial(Base):
    def forward(self, x):
        half = x.shape[-1] // 2
        scale = x[..., :half].pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return x * torch.rsqrt(scale) * self.weight


class Random(Llama):
    def forward(self, x):
        return F.dropout(self.scaled(x) * self.weight, 0.1, self.training)


class Counting(Llama):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.scaled(x) * self.weight


class Gated(Llama):
    def forward(self, x, gate=None):
        return self.scaled(x) * self.weight if gate is None else gate * x


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, -1)).transpose(1, -1)


class Half(Llama):
    def forward(self, x):
        y = self.scaled(x.float()) * self.weight
        return y if x.dtype == torch.float32 else y.half()


class Unweighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-5

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Sub(nn.LayerNorm):
    pass


def swapped(module):
    model = nn.Sequential(module)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float32).to(p.dtype) * 0.3)
    handle = fastllm.swap(model)
    return model, handle.report()


def module_dtype(module):
    return next((p.dtype for p in module.parameters()), torch.float32)


RECOGNIZED = [
    (Llama(), "rms_norm"),
    (Llama(eps=1e-2), "rms_norm"),
    (Gemma(), "rms_norm, weight + 1"),
    (Naive(bias=True), "layer_norm"),
    (Layer1p(), "layer_norm, weight + 1"),
    (Layer1p(bias=True), "layer_norm, weight + 1"),
    (Sub(24), "layer_norm"),
    (Sub(24, elementwise_affine=False), "layer_norm"),
    (Unweighted(), "rms_norm"),
    (Llama().bfloat16(), "rms_norm"),
]


@pytest.mark.parametrize(("module", "to"), RECOGNIZED)
def test_recognized(module, to):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    keys = list(vars(module))
    assert probe.identify(module, None)[0].kind == to.split(",")[0]
    assert list(vars(module)) == keys
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    stock = type(module).forward
    model, report = swapped(module)
    (row,) = report.rows
    assert row.new == f"fastllm {to}" and row.error is not None, str(report)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(3, 5, 24).to(dtype)
        try:
            theirs = stock(module, x)
        except RuntimeError as error:  # torch's layer_norm refuses some pairs of dtypes
            assert "mixed dtype" in str(error) and dtype != module_dtype(module)
            continue
        mine = model(x)
        assert mine.dtype == theirs.dtype
        close = 1e-5 if dtype in (torch.float32, torch.float64) else 0.05
        assert torch.allclose(mine.double(), theirs.double(), rtol=close, atol=close)


LEFT = [
    (EpsOutside(), "computes what it computes"),
    (Unbiased(), "does not run on random input"),  # its weight is unused
    (Detached(), "computes what it computes"),
    (Partial(), "computes what it computes"),
    (Random(), "random"),
    (Counting(), "changes the module"),
    (Gated(), "more than one argument"),
    (ChannelsFirst(24), "it computes|does not run"),
    (nn.BatchNorm2d(3), "buffers"),
    (nn.InstanceNorm1d(3, affine=True), "it computes|does not run"),
    (nn.LazyBatchNorm1d(), "buffers|initialized"),
    (nn.LocalResponseNorm(2), "no float epsilon"),
    (Llama().double(), "float64"),
]


@pytest.mark.parametrize(("module", "reason"), LEFT)
def test_left_alone_with_the_reason(module, reason):
    before = type(module)
    report = fastllm.swap(nn.Sequential(module)).report()
    assert type(module) is before and not report.swapped
    (row,) = report.left
    assert re.search(reason, row.reason), row.reason


def test_dtype_pairs_that_differ_run_the_original():
    """Llama's norm promotes when the weight is float32 and the input is not; ours would not."""
    model, _ = swapped(Llama())
    x = torch.randn(3, 24).bfloat16()
    assert model(x).dtype == torch.float32 and torch.equal(model(x), Llama.forward(model[0], x))
    served = type(model[0])._fastllm_recipe.served
    assert (torch.float32, torch.float32) in served
    assert (torch.bfloat16, torch.float32) not in served
    model, _ = swapped(Half())
    assert (torch.bfloat16, torch.float32) not in type(model[0])._fastllm_recipe.served
    assert model(x).dtype == torch.float16


@pytest.mark.parametrize("kind", [Llama, Gemma])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_original_dtype(kind, dtype):
    model, _ = swapped(kind())
    x = torch.randn(3, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = model(x), kind.forward(model[0], x)
    assert mine.dtype == theirs.dtype
    assert torch.allclose(mine.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_argument_may_be_passed_by_its_name():
    model, _ = swapped(Llama())
    x = torch.randn(3, 24)
    assert torch.equal(model[0](hidden_states=x), model[0](x))


def test_epsilon_is_read_when_it_runs():
    model, _ = swapped(Llama())
    x = torch.randn(3, 24)
    model[0].variance_epsilon = 2.0
    assert torch.allclose(model(x), Llama.forward(model[0], x), rtol=1e-5, atol=1e-6)


def test_weight_norm_keeps_its_hooks():
    model = nn.Sequential(nn.LayerNorm(8))
    torch.nn.utils.parametrizations.weight_norm(model[0], dim=None)
    report = fastllm.swap(model).report()
    assert not report.swapped
    model = nn.Sequential(nn.LayerNorm(8))
    prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 8)
    stock = model(x)
    with fastllm.swap(model) as handle:
        assert len(handle.report().swapped) == 1
        assert torch.allclose(model(x), stock, rtol=1e-5, atol=1e-6)


def test_one_probe_for_modules_alike(monkeypatch):
    calls = []
    identify = probe.identify
    monkeypatch.setattr(probe, "identify", lambda *a: calls.append(a) or identify(*a))
    report = fastllm.swap(nn.Sequential(*[Llama() for _ in range(5)], Llama(eps=1e-3))).report()
    assert len(report.swapped) == 6 and len(calls) == 2


def test_group_norm():
    model = nn.Sequential(nn.GroupNorm(2, 6))
    x = torch.randn(3, 6, 5, 4)
    stock = model(x)
    with fastllm.swap(model, verify=x) as handle:
        assert handle.report().swapped[0].new == "fastllm group_norm"
        assert torch.allclose(model(x), stock, rtol=1e-5, atol=1e-5)
