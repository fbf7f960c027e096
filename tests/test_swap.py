"""The mechanics of swap: what it touches, what it refuses, and the way back."""

import copy
import io
import pickle

import pytest
import torch
from rich.console import Console
from torch import nn

import fastllm.swap
import fastllm.swap.rules
from fastllm import UnsupportedError
from fastllm import nn as fast
from fastllm.swap import engine


class Block(nn.Module):
    def __init__(self, size=16):
        super().__init__()
        self.norm1 = nn.LayerNorm(size)
        self.mix = nn.Linear(size, size)
        self.norm2 = nn.RMSNorm(size, eps=1e-6)
        self.mlp = nn.Linear(size, size)

    def forward(self, x):
        x = x + self.mix(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class Model(nn.Module):
    def __init__(self, size=16, layers=2):
        super().__init__()
        self.embed = nn.Embedding(20, size)
        self.layers = nn.ModuleList([Block(size) for _ in range(layers)])
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(24).reshape(4, 6) % 20


def classes(model):
    return [type(m) for m in model.modules()]


def attributes(model):
    return [[(k, id(v)) for k, v in vars(m).items()] for m in model.modules()]


def test_package_and_function_of_one_name():
    assert callable(fastllm.swap)
    assert fastllm.swap.swap is fastllm.swap
    assert fastllm.swap.rules.RULES
    assert "include" in fastllm.swap.__call__.__doc__


def test_only_this_instance_changes():
    model, other = Model(), Model()
    before = {c: dict(vars(c)) for c in {*classes(model), torch.nn.Module}}
    params = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = list(model.state_dict())
    handle = fastllm.swap(model)
    assert handle.report().count("norm") == 5 and handle.report().adds == 2
    assert {c: dict(vars(c)) for c in before} == before
    assert not any(hasattr(c, "_fastllm_recipe") for c in classes(other))
    assert [id(p) for p in model.parameters()] == params
    assert list(model.state_dict()) == names
    assert model.head.weight is model.embed.weight
    assert isinstance(model.norm, nn.LayerNorm) and isinstance(model.layers[0], Block)
    assert type(model.layers[0]).__name__ == "Block"
    old = model.norm.weight.detach().clone()
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(old, model.norm.weight)


def test_restore_is_exact_and_repeatable():
    model = Model()
    before = classes(model), attributes(model)
    stock = model(IDS)
    with fastllm.swap(model) as handle:
        assert classes(model) != before[0]
        assert set(handle.modules) == {
            *("embed", "head", "layers.0.mix", "layers.0.mlp", "layers.1.mix", "layers.1.mlp"),
            "layers.0",
            "layers.1",
            "layers.0.norm1",
            "layers.0.norm2",
            "layers.1.norm1",
            "layers.1.norm2",
            "norm",
        }
    assert (classes(model), attributes(model)) == before
    assert torch.equal(model(IDS), stock)
    handle.restore()
    assert (classes(model), attributes(model)) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_handles_in_any_order(order):
    model = Model()
    before = classes(model), attributes(model)
    stock = model(IDS)
    handles = [
        fastllm.swap(model.layers[0], include="norm2"),
        fastllm.swap(model, include="*.norm1"),
        fastllm.swap(model),
    ]
    for i in order:
        assert torch.allclose(model(IDS), stock, rtol=1e-4, atol=1e-5)
        handles[i].restore()
    assert (classes(model), attributes(model)) == before


def test_two_swaps_of_one_block_are_merged():
    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LayerNorm(16), nn.LayerNorm(16)

        def forward(self, x, y):
            return self.b(self.a(x + y) + y)

    block = Post()
    first, second = fastllm.swap(block, include="a"), fastllm.swap(block, include="b")
    assert type(block)._fastllm_recipe.norms == ("a", "b")
    first.restore()
    assert type(block)._fastllm_recipe.norms == ("b",)
    second.restore()
    assert type(block) is Post


def test_exception_half_way_rolls_back(monkeypatch):
    model = Model()
    before = classes(model), attributes(model)
    change, calls = engine.Handle.change, []

    def failing(self, path, module, recipe):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        change(self, path, module, recipe)

    monkeypatch.setattr(engine.Handle, "change", failing)
    with pytest.raises(KeyboardInterrupt):
        fastllm.swap(model)
    assert len(calls) == 4
    assert (classes(model), attributes(model)) == before


def test_exception_in_verify_rolls_back():
    model = Model()
    before = classes(model), attributes(model)
    with pytest.raises(IndexError):
        fastllm.swap(model, verify=torch.full((1, 3), 99))
    assert (classes(model), attributes(model)) == before


def test_include_and_exclude():
    def paths(**wish):
        model = Model()
        with fastllm.swap(model, **wish) as handle:
            return {row.path for row in handle.report().swapped if row.kind == "norm"}

    assert paths(include="layers.0") == {"layers.0.norm1", "layers.0.norm2"}
    assert paths(include=["layers.0.*", nn.RMSNorm]) == {
        "layers.0.norm1",
        "layers.0.norm2",
        "layers.1.norm2",
    }
    assert paths(exclude="layers.*") == {"norm"}
    assert paths(exclude=Block) == {"norm"}
    assert paths(include=lambda path, module: path.endswith("norm2")) == {
        "layers.0.norm2",
        "layers.1.norm2",
    }
    model = Model()
    report = fastllm.swap(model, exclude=lambda path, module: path == "layers.0").report()
    assert [row.path for row in report.fused] == ["layers.1"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_without_match_names_the_argument(argument):
    with pytest.raises(ValueError, match=rf"{argument}: 'layer\.\*' matches no module"):
        fastllm.swap(Model(), **{argument: "layer.*"})
    with pytest.raises(ValueError, match=f"{argument}: .*Conv2d"):
        fastllm.swap(Model(), **{argument: nn.Conv2d})
    with pytest.raises(TypeError, match=f"{argument}: expected"):
        fastllm.swap(Model(), **{argument: 3})


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, found dict"):
        fastllm.swap({})
    with pytest.raises(ValueError, match=r"backend: expected one of .* found 'fast'"):
        fastllm.swap(Model(), backend="fast")
    with pytest.raises(TypeError, match="verify: expected a tensor"):
        fastllm.swap(Model(), verify="text")
    with pytest.raises(ValueError, match="verify: the list of inputs is empty"):
        fastllm.swap(Model(), verify=[])


def test_backend_is_baked_in():
    model = Model()
    stock = model(IDS)
    with fastllm.swap(model, backend="reference", verify=IDS) as handle:
        assert {row.backend for row in handle.report().swapped} == {"reference"}
        assert torch.allclose(model(IDS), stock, rtol=1e-4, atol=1e-5)
    if not torch.cuda.is_available():
        before = classes(model)
        with pytest.raises(UnsupportedError, match="cuda"):
            fastllm.swap(model, backend="cuda")
        assert classes(model) == before


def test_shared_module_is_swapped_once():
    model = Model()
    model.layers[1].norm1 = model.layers[0].norm1
    report = fastllm.swap(model).report()
    (row,) = [row for row in report.swapped if row.path == "layers.0.norm1"]
    assert "layers.1.norm1" in row.new and report.count("norm") == 4


def test_report_prints():
    model = Model()
    model.norm.register_buffer("extra", torch.zeros(1))
    model.batch = nn.BatchNorm1d(3)
    handle = fastllm.swap(model)
    text = str(handle)
    assert "swapped 5 norms, 5 linears, 1 embedding; fused 2 residual additions; left 1" in text
    assert "batch" in text and "it keeps buffers" in text
    assert str(handle.report()) == text and "swapped 5 norms" in repr(handle)
    out = io.StringIO()
    Console(file=out, width=200).print(handle, handle.report())
    assert "layers.0.norm2" in out.getvalue()


def test_pickle_keeps_the_swap():
    model = Model()
    fastllm.swap(model)
    stock = model(IDS)
    loaded = pickle.loads(pickle.dumps(model))
    assert classes(loaded) == classes(model)
    assert torch.equal(loaded(IDS), stock)
    assert loaded.head.weight is loaded.embed.weight
    assert fastllm.swap.restore(loaded) == 13 and type(loaded.norm) is nn.LayerNorm
    assert fastllm.swap.restore(loaded) == 0


def test_handle_after_module_wide_restore():
    model = Model()
    before = classes(model)
    handle = fastllm.swap(model)
    fastllm.swap.restore(model)
    handle.restore()
    assert classes(model) == before


def test_natively_fast_modules_stay():
    model = nn.Sequential(fast.LayerNorm(8), nn.LayerNorm(8))
    with fastllm.swap(model):
        pass
    assert fastllm.swap.restore(model) == 0
    assert [type(m) for m in model] == [fast.LayerNorm, nn.LayerNorm]


def test_forward_overridden_on_the_instance_is_left():
    model = Model()
    model.norm.forward = lambda x: x * 2
    report = fastllm.swap(model).report()
    (row,) = report.left
    assert row.path == "norm" and "overridden on the instance" in row.reason


def test_class_replaced_after_the_swap():
    model = Model()
    handle = fastllm.swap(model)
    ours = type(model.norm)
    model.norm.__class__ = type("Wrapped", (ours,), {})
    with pytest.raises(RuntimeError, match="'norm' became a Wrapped after the swap"):
        handle.restore()
    assert type(model.layers[0].norm1) is not nn.LayerNorm, "nothing may be half restored"
    model.norm.__class__ = ours
    handle.restore()
    assert type(model.norm) is nn.LayerNorm


def test_patched_torch_is_respected(monkeypatch):
    model = Model()
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
    report = fastllm.swap(model).report()
    norms = {row.path for row in report.swapped if row.kind == "norm"}
    assert norms == {"layers.0.norm2", "layers.1.norm2"}
    assert all("replaced by another library" in row.reason for row in report.left)


def test_cuda_and_meta_parameters():
    with torch.device("meta"):
        model = Model()
    handle = fastllm.swap(model)
    assert len(handle.report().swapped) == 11
    handle.restore()


def test_copy_of_model_is_independent():
    model = Model()
    handle = fastllm.swap(model)
    twin = copy.deepcopy(model)
    handle.restore()
    assert type(model.norm) is nn.LayerNorm and type(twin.norm) is not nn.LayerNorm
    assert torch.allclose(twin(IDS), model(IDS), rtol=1e-4, atol=1e-5)
