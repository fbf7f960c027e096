"""Mixtures of experts: routing, the module, and the experts of transformers."""

import copy
import pickle

import pytest
import torch

from fastllm import functional as F
from fastllm import nn as fast
from fastllm.core.proof import relative_error
from fastllm.nn.moe import moe_experts


def test_route_sorts_by_expert_and_keeps_the_order_of_tokens():
    index = torch.tensor([[2, 0], [0, 3], [2, 1], [5, 0]])
    position, offsets = F.moe_route(index, 5)
    assert offsets.dtype == torch.int32 and offsets.tolist() == [3, 4, 6, 7, 7]
    assert position.tolist() == [[4, 0], [1, 6], [5, 3], [7, 2]]
    assert sorted(position.flatten().tolist()) == list(range(8))


def test_route_names_what_is_wrong():
    with pytest.raises(ValueError, match="index: expected integers"):
        F.moe_route(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match="index: expected integers"):
        F.moe_route(torch.zeros(3, dtype=torch.int64), 4)


@pytest.mark.parametrize("bad", [[[0, 4], [1, 2]], [[-1, 0], [1, 2]]])
def test_positions_out_of_range_are_refused(bad):
    position = torch.tensor(bad)
    with pytest.raises(ValueError, match="position: expected places from 0 to 3"):
        F.moe_permute(torch.randn(2, 3), position)
    with pytest.raises(ValueError, match="position: expected places from 0 to 3"):
        F.moe_unpermute(torch.randn(4, 3), position)


@pytest.mark.parametrize("ends", [[3, 2], [-1, 4], [2, 9]])
def test_offsets_that_do_not_fit_are_refused(ends):
    offsets = torch.tensor(ends, dtype=torch.int32)
    for backend in ("cpu", "torch", "reference"):
        with pytest.raises(ValueError, match="offsets: expected ends that do not decrease"):
            F.grouped_linear(torch.randn(5, 4), torch.randn(2, 3, 4), offsets, backend=backend)


def test_an_expert_without_rows_has_a_zero_gradient():
    weights = torch.randn(3, 5, 4, requires_grad=True)
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32)
    x = torch.randn(8, 4, requires_grad=True)
    y = F.grouped_linear(x, weights, offsets)
    assert not y[6:].any()
    y.backward(torch.randn(8, 5))
    assert not weights.grad[1].any() and not x.grad[6:].any()
    assert weights.grad[0].any() and weights.grad[2].any()


def plain_experts(x, index, weights, gate_up, down, act):
    """Token by token, as the definition has it."""
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[0])
        for e, w in zip(index[token], weights[token], strict=True):
            if e < gate_up.shape[0]:
                gate, up = (gate_up[e] @ x[token]).chunk(2)
                total = total + w * (down[e] @ (act(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_experts_are_the_definition(activation):
    acts = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    }
    x, weights = torch.randn(9, 12, requires_grad=True), torch.rand(9, 2, requires_grad=True)
    gate_up = torch.randn(4, 10, 12, requires_grad=True)
    down = torch.randn(4, 12, 5, requires_grad=True)
    index = torch.stack([torch.randperm(5)[:2] for _ in range(9)])  # 4 is no expert
    wanted = (x, weights, gate_up, down)
    ours = moe_experts(x, index, weights, gate_up, down, activation=activation)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, wanted, upstream)
    doubled = [t.detach().double().requires_grad_() for t in wanted]
    exact = plain_experts(doubled[0], index, *doubled[1:], acts[activation])
    right = torch.autograd.grad(exact, doubled, upstream.double())
    for a, b in zip((ours, *grads), (exact, *right), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_module_is_a_module():
    module = fast.MoE(12, 20, 4, 2)
    assert list(module.state_dict()) == ["router", "gate_up_proj", "down_proj"]
    x = torch.randn(2, 5, 12)
    y = module(x)
    assert y.shape == x.shape and module.router_logits.shape == (10, 4)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    for twin in (
        copy.deepcopy(fast.MoE(12, 20, 4, 2)),
        pickle.loads(pickle.dumps(fast.MoE(4, 4, 2, 1))),
    ):
        assert isinstance(twin, fast.MoE)
    assert "num_experts=4, top_k=2" in repr(module)
    with pytest.raises(ValueError, match="top_k: expected 1 to num_experts"):
        fast.MoE(12, 20, 4, 5)
    with pytest.raises(ValueError, match="activation: expected one of"):
        fast.MoE(12, 20, 4, 2, activation="tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_compiles_whole(dtype):
    torch._dynamo.reset()
    module = fast.MoE(16, 24, 4, 2, dtype=dtype)
    x = torch.randn(6, 16, dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).sum().backward()
    assert module.gate_up_proj.grad.isfinite().all()


def test_module_under_autocast_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    module, x = fast.MoE(16, 24, 4, 2), torch.randn(6, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), module(x)) < 1e-2  # bfloat16 rounds by 4e-3
    upstream = torch.randn(6, 16)
    (plain,) = torch.autograd.grad(module(x), x, upstream)
    (again,) = torch.autograd.grad(checkpoint(module, x, use_reentrant=False), x, upstream)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_the_experts_of_transformers(dtype):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    from transformers import MixtralConfig

    config = MixtralConfig(hidden_size=32, intermediate_size=48, num_local_experts=6)
    config._experts_implementation = "eager"
    experts = mixtral.MixtralExperts(config).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(20, 32, dtype=dtype)
    index = torch.stack([torch.randperm(6)[:2] for _ in range(20)])
    weights = torch.rand(20, 2)  # float32 in Mixtral
    theirs = experts(x, index, weights)
    ours = moe_experts(x, index, weights, experts.gate_up_proj, experts.down_proj)
    doubled = copy.deepcopy(experts).double()
    exact = doubled(x.double(), index, weights.double())
    size = exact.abs().max().item()
    error = ((ours.double() - exact).abs().max() / size).item()
    stock = ((theirs.double() - exact).abs().max() / size).item()
    assert error <= 2 * stock + torch.finfo(dtype).eps
