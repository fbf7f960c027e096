"""swap(model, example_inputs=..., tune=True): measured in place, only winners stay."""

import pytest
import torch
from torch import nn

import fastllm
from fastllm.core.measure import Ratio
from fastllm.swap import classes, winners


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)

    def forward(self, x):
        return self.second(x + self.mix(self.first(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.LayerNorm(64)

    def forward(self, x):
        return self.last(self.blocks(x))


@pytest.fixture
def timed(monkeypatch):
    """Ratios as a test wants them, by module; the real measurement is checked to run."""
    wanted, seen = {}, []
    measure = winners._ratio

    def ratio(head, members, given, budget=0.0):
        measure(head, members, given, 0.02)
        seen.append(head)
        value = wanted.get(type(head).__name__, 1.5)
        return Ratio(value, value, value)

    monkeypatch.setattr(winners, "_ratio", ratio)
    return wanted, seen


def test_every_module_has_its_ratio_and_the_model_one(timed):
    model, x = Model(), torch.randn(3, 64)
    expected = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    handle = fastllm.swap(model, exclude=nn.Linear, example_inputs=x, tune=True)
    report = handle.report()
    assert report.ratio == 1.5 and all(row.ratio == 1.5 for row in report.swapped)
    assert "1.50x" in str(report) and "whole model" in str(report)
    assert len(timed[1]) == 3  # blocks that are alike are timed once: a block, the last, the model
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and model.training
    handle.restore()
    assert not any(classes.made(type(m)) for m in model.modules())
    assert torch.equal(model(x), expected)


def test_what_loses_is_put_back_and_the_report_says_so(timed):
    timed[0]["LayerNorm"] = 0.8
    model, x = Model(), torch.randn(3, 64)
    handle = fastllm.swap(model, example_inputs=x, tune=True)
    by_path = {row.path: row for row in handle.report()}
    assert by_path["last"].reason == winners.SLOWER and by_path["last"].ratio == 0.8
    assert type(model.last) is nn.LayerNorm
    assert classes.made(type(model.blocks[0])) and "0.80x" in str(handle.report())
    handle.restore()


def test_nothing_wins_nothing_stays(timed):
    timed[0].update(LayerNorm=0.5, Block=0.9)
    model, x = Model(), torch.randn(3, 64)
    handle = fastllm.swap(model, exclude=nn.Linear, example_inputs=x, tune=True)
    assert not handle.modules and handle.report().ratio == 1.0
    assert not any(classes.made(type(m)) for m in model.modules())
    assert "nothing was faster" in str(handle.report())


def test_the_measurement_is_real_and_leaves_the_classes_alone(tuned):
    model, x = Model(), torch.randn(3, 64)
    handle = fastllm.swap(model, example_inputs={"x": x}, tune=True)
    assert handle.report().ratio > 0
    for module in handle.modules.values():
        assert classes.made(type(module))
    assert list((tuned / "tune").glob("*.json"))
    handle.restore()


def test_inference_only_and_refusals(timed):
    model = Model().requires_grad_(False)
    assert fastllm.swap(model, example_inputs=torch.randn(2, 64), tune=True).report().ratio == 1.5
    with pytest.raises(ValueError, match="example_inputs: expected the inputs to tune with"):
        fastllm.swap(Model(), tune=True)
