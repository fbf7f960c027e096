"""swap: the experts of Hugging Face mixtures become grouped products, proven and only there."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import fastllm
from fastllm.core.proof import compare
from fastllm.swap.experts import Experts

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


def mixtral(**options):
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, **options))


def qwen():
    config = Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=6, head_dim=8)
    return Qwen3MoeForCausalLM(config)


def experts_of(model):
    return next(m for m in model.modules() if "Experts" in type(m).__name__)


def call(experts, args, upstream):
    leaves = [args[0].clone().requires_grad_(), args[2].clone().requires_grad_()]
    y = experts(leaves[0], args[1], leaves[1])
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *experts.parameters()], upstream)]


@pytest.mark.parametrize("made", [mixtral, qwen, lambda: mixtral(hidden_act="gelu")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_give_what_they_gave(made, dtype):
    model = made()
    model.set_experts_implementation("eager")
    experts = experts_of(model).to(dtype)
    tokens = 400 if dtype == torch.bfloat16 else 13  # enough to be worth it
    args = (
        torch.randn(tokens, 32).to(dtype),
        torch.randint(experts.num_experts, (tokens, 2)),
        torch.rand(tokens, 2).to(dtype),
    )
    upstream = torch.randn(tokens, 32).to(dtype)
    stock = call(experts, args, upstream)
    exact = call(
        copy.deepcopy(experts).double(),
        (args[0].double(), args[1], args[2].double()),
        upstream.double(),
    )
    with fastllm.swap(model) as handle:
        assert handle.report().count("mixture of experts") == 1, str(handle.report())
        assert isinstance(type(experts)._fastllm_recipe, Experts)
        ours = call(experts, args, upstream)
        for i, triple in enumerate(zip(ours, stock, exact, strict=True)):
            proof = compare(f"result {i}", *triple)
            assert proof.ok, proof.message
    assert not hasattr(type(experts), "_fastllm_recipe")


def test_it_is_grouped_products_that_run(monkeypatch):
    model = mixtral()
    calls = []
    real = fastllm.functional.grouped_linear
    monkeypatch.setattr(
        "fastllm.functional.grouped_linear", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    fastllm.swap(model)
    calls.clear()  # what the proof called
    ids = torch.randint(60, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2  # float32 with gradients: always
    with torch.no_grad():
        model(ids)
    assert len(calls) == 2  # 36 rows for 4 experts without gradients: transformers' own
    with torch.no_grad():
        model(torch.randint(60, (8, 32)))
    assert len(calls) == 4


def test_whole_models_agree_and_verify():
    for model in (mixtral(), qwen()):
        ids = torch.randint(60, (2, 9))
        handle = fastllm.swap(model, verify={"input_ids": ids})
        assert handle.report().count("mixture of experts") == 1, str(handle.report())


def test_experts_of_another_kind_stay():
    config = GptOssConfig(**SMALL, num_local_experts=4, head_dim=8)
    report = fastllm.swap(GptOssForCausalLM(config)).report()
    assert report.count("mixture of experts") == 0
    assert any("experts not grouped" in row.reason for row in report.left)
    model = mixtral()
    fastllm.swap(model, exclude=["*.act_fn"])
    assert not hasattr(type(experts_of(model)), "_fastllm_recipe")


def test_a_parallel_or_changed_module_runs_its_own_forward():
    model = mixtral()
    experts = experts_of(model)
    args = (torch.randn(5, 32), torch.randint(4, (5, 2)), torch.rand(5, 2))
    stock = experts(*args)
    fastllm.swap(model)
    torch.testing.assert_close(experts(*args), stock)
    experts.act_fn = torch.nn.ReLU()
    found = experts(*args)
    assert not torch.allclose(found, stock)
    fastllm.swap.restore(model)
    torch.testing.assert_close(experts(*args), found)
