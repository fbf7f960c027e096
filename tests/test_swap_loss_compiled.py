"""swap(fused_loss=True) under torch.compile: one graph, and logits that are there on demand."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")
from test_swap_loss import (
    MODELS,
    adapter_step,
    batch,
    each_model,
    llama,
    only_its_loss,
    only_loss,
    step,
    with_adapter,
)

from fastllm.swap.deferred import Deferred
from fastllm.swap.lazy import LazyLogits


def compiled(model, ops, backend="aot_eager"):
    """The model in one graph (where its own code is), whose ops' names are added to `ops`."""
    torch._dynamo.reset()
    inner = torch._dynamo.lookup_backend(backend)

    def look(graph, example_inputs):
        ops.update(str(node.target) for node in graph.graph.nodes)
        return inner(graph, example_inputs)

    # transformers' own loss_function logs for GPT-2, which no graph can hold
    return torch.compile(model, backend=look, fullgraph=type(model).__name__ != "GPT2LMHeadModel")


@each_model
@pytest.mark.parametrize("items", [None, torch.tensor(19)], ids=str)
def test_compiles_whole_and_agrees(name, items):
    """One graph with the fused loss and without the head's product; logits are there on demand."""
    model, inputs, ops = MODELS[name]().train(), batch(), set()
    if items is not None:
        inputs["num_items_in_batch"] = items
    stock, expected = step(model, inputs)
    only_loss(model)
    run = compiled(model, ops)
    out = run(**inputs, use_cache=False)
    model.zero_grad()
    out.loss.backward(retain_graph=True)
    torch.testing.assert_close(out.loss, stock.loss)
    found = {n: p.grad for n, p in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any("linear_cross_entropy" in op for op in ops) and not any("log_soft" in o for o in ops)
    assert isinstance(out.logits, Deferred) and out.logits.made is None
    assert out.logits.shape == stock.logits.shape and out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits.detach(), stock.logits)
    torch.testing.assert_close(torch.softmax(out.logits, -1), stock.logits.softmax(-1))
    torch.testing.assert_close((out.logits * 2 - 1)[:, -1], (stock.logits * 2 - 1)[:, -1])
    assert torch.equal(out.logits.argmax(-1), stock.logits.argmax(-1))
    assert pickle.loads(pickle.dumps(run(**inputs).logits.detach())).shape == stock.logits.shape
    assert "forward" not in vars(model.get_output_embeddings())
    assert type(model(**inputs).logits) is LazyLogits


def test_a_compiled_step_trains_and_guards_its_logits():
    """Inductor, several steps, a changed weight: the graph reads the new one, old logits refuse."""
    model, inputs = llama(), batch()
    twin = copy.deepcopy(model)
    only_loss(model)
    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True)
    pair = [(run, model), (twin, twin)]
    makers = [torch.optim.SGD(m.parameters(), lr=0.5) for _, m in pair]
    for _ in range(3):
        outs = []
        for (call, _), optimizer in zip(pair, makers, strict=True):
            optimizer.zero_grad()
            outs.append(call(**inputs, use_cache=False))
            outs[-1].loss.backward()
            optimizer.step()
        torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="look at them before the optimizer's step"):
        outs[0].logits.argmax(-1)


def test_a_compiled_step_of_the_users_own_looks_at_logits():
    """Inside of the graph, too: there they are computed."""
    model, inputs = llama(), batch()

    def look(**given):
        out = model(**given)
        return out.loss + out.logits.sum(), out.logits[:, -1]

    expected = look(**inputs)
    only_loss(model)
    torch._dynamo.reset()
    found = torch.compile(look, backend="aot_eager", fullgraph=True)(**inputs)
    torch.testing.assert_close(found, expected)


def test_heads_with_adapters_compile_whole():
    model, inputs, ops = with_adapter("lora"), batch(), set()
    stock, expected = adapter_step(model, inputs)
    with only_its_loss(model):
        out = compiled(model, ops)(**inputs, use_cache=False)
        model.zero_grad()
        out.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(out.loss, stock.loss)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert any("linear_cross_entropy" in op for op in ops)
