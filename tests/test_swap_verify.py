"""verify=: what is wrong is found, named and put back; all else stays as it was."""

import random

import numpy
import pytest
import torch
from torch import nn

import fastllm.functional
import fastllm.swap
from fastllm.core import run


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16, eps=1e-6)
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = x + self.f(self.norm(x))
        return x + self.g(self.norm2(x))


def model(blocks=2):
    made = nn.Sequential(*[Block() for _ in range(blocks)])
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return made


X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))


def test_wrong_norm_is_put_back(monkeypatch):
    real = fastllm.functional.rms_norm
    monkeypatch.setattr(fastllm.functional, "rms_norm", lambda *a, **k: real(*a, **k) * 1.001)
    m = model()
    handle = fastllm.swap(m, verify=X)
    left = {row.path: row.reason for row in handle.report().left}
    assert left.keys() == {"0.norm2", "1.norm2"}
    assert all(reason.startswith("verify: ") for reason in left.values())
    assert type(m[0].norm2) is nn.RMSNorm and type(m[0].norm) is not nn.LayerNorm
    assert "0.norm2" not in handle.modules and "0.norm" in handle.modules
    handle.restore()
    assert type(m[0]) is Block


def test_wrong_gradient_is_found(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    real = fastllm.functional.layer_norm
    monkeypatch.setattr(
        fastllm.functional, "layer_norm", lambda x, *a, **k: real(Wrong.apply(x), *a, **k)
    )
    report = fastllm.swap(model(), verify=X).report()
    assert {row.path for row in report.left} == {"0.norm", "1.norm"}
    assert "gradient of the input" in report.left[0].reason


def test_wrong_addition_is_put_back(monkeypatch):
    """Wrong only inside the model, so that no single norm can be blamed."""
    real = fastllm.functional.add_rms_norm
    inside = []

    def wrong(input, residual, *args, **kwargs):
        output, total = real(input, residual, *args, **kwargs)
        return (output * 1.01, total) if inside else (output, total)

    monkeypatch.setattr(fastllm.functional, "add_rms_norm", wrong)
    m = model()
    m.register_forward_pre_hook(lambda *a: inside.append(1))
    m.register_forward_hook(lambda *a: inside.clear())
    # the proof of single norms runs inside of hooks, too: leave those alone
    from fastllm.swap import verify

    prove = verify.prove_module
    monkeypatch.setattr(
        verify, "prove_module", lambda *a: (inside.clear(), prove(*a), inside.append(1))[1]
    )
    report = fastllm.swap(m, verify=X).report()
    assert not report.fused and report.count("norm") == 4
    assert "the fused blocks were put back" in report.notes[0]
    assert type(m[0]) is Block


def test_whole_model_is_put_back(monkeypatch):
    from fastllm.swap import verify
    from fastllm.swap.prove import Proof

    m = model()
    before = [type(x) for x in m.modules()]
    monkeypatch.setattr(verify, "prove_module", lambda *a: Proof(True, 0.0, 1.0, "blind"))
    real = fastllm.functional.layer_norm
    monkeypatch.setattr(fastllm.functional, "layer_norm", lambda *a, **k: real(*a, **k) + 0.01)
    handle = fastllm.swap(m, verify=X)
    assert [type(x) for x in m.modules()] == before
    assert not handle.modules and not handle.report().swapped
    assert "everything was put back" in handle.report().notes[-1]


def test_nothing_of_the_run_stays():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.batch = Block(), nn.BatchNorm1d(5)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            random.random(), numpy.random.rand(), torch.rand(1)
            return self.batch(nn.functional.dropout(self.block(x), 0.5, self.training))

    m = Stateful().train()
    m.block.eval()
    m.block.f.weight.grad = torch.ones(16, 16)
    buffers = {k: v.clone() for k, v in m.named_buffers()}
    x = X.clone().requires_grad_()
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    handle = fastllm.swap(m, verify=x)
    assert handle.report().count("norm") == 2, str(handle)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert m.training and not m.block.training and m.batch.training and m.calls == 0
    assert all(torch.equal(v, buffers[k]) for k, v in m.named_buffers())
    assert torch.equal(m.block.f.weight.grad, torch.ones(16, 16)) and x.grad is None
    assert all(p.grad is None for n, p in m.named_parameters() if n != "block.f.weight")


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), {"input": X}, [X, (X * 2,), {"input": -X}]],
    ids=["x", "tuple", "dict", "list"],
)
def test_forms_of_inputs(inputs):
    report = fastllm.swap(model(), verify=inputs).report()
    assert not report.left and "verified outputs and gradients on" in report.notes[-1]


def test_frozen_model_compares_outputs():
    m = model().requires_grad_(False)
    assert "verified outputs on 1 input" in fastllm.swap(m, verify=X).report().notes[-1]


def test_model_that_cannot_run_in_float64(by_size):
    class Fixed(Block):
        def forward(self, x):
            return super().forward(x.float()) @ torch.ones(16, 16)

    report = fastllm.swap(Fixed(), verify=X).report()
    assert report.count("norm") == 2
    assert "cannot run in torch.float64" in report.notes[0]
    assert "compared with the original's own result" in report.notes[1]


def test_low_precision_model_that_cannot_run_in_float64():
    class Fixed(Block):
        def forward(self, x):
            if x.dtype == torch.float64:
                raise TypeError("no doubles here")
            return super().forward(x)

    report = fastllm.swap(Fixed().bfloat16(), verify=X.bfloat16()).report()
    assert report.count("norm") == 2 and len(report.notes) == 2
    assert "no doubles here" in report.notes[0] and "verified" in report.notes[1]


def test_reentrant_checkpointing_is_said():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=True)

    import torch.utils.checkpoint

    x = X.clone().requires_grad_()
    report = fastllm.swap(Checkpointed(), verify=x).report()
    assert "gradients were not compared" in report.notes[0] and report.count("norm") == 2


def test_nan_inputs_are_compared_as_they_are():
    x = X.clone()
    x[0, 0, 0] = float("nan")
    x[1, 0, 0] = float("inf")
    report = fastllm.swap(model().requires_grad_(False), verify=x).report()
    assert not report.left, str(report)


def test_model_that_cannot_be_copied():
    class Stubborn(Block):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    m = Stubborn()
    with pytest.raises(ValueError, match="verify: the model cannot be copied"):
        fastllm.swap(m, verify=X)
    assert type(m) is Stubborn and type(m.norm) is nn.LayerNorm


def test_memory_is_checked_before_a_copy(monkeypatch):
    import os

    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    with pytest.raises(ValueError, match="MB are free"):
        fastllm.swap(model(), verify=X)


def test_preserved_puts_buffers_back():
    m = nn.BatchNorm1d(4).train()
    buffer = m.running_mean
    with run.preserved(m):
        assert not m.training
        m.running_mean.add_(1)
        m.running_var = torch.zeros(4)
    assert m.running_mean is buffer and m.running_mean.sum() == 0
    assert m.running_var.sum() == 4 and m.training
