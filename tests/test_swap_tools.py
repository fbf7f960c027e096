"""A swapped model under compile, autocast, checkpointing, DDP, FSDP2, PEFT and accelerate."""

import copy
import os
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from swap_models import build
from torch import nn

import fastllm.functional
import fastllm.swap

pytest.importorskip("transformers")


def losses(model, inputs, steps=4, autocast=False, optimizer=None):
    """Losses of a short training run without randomness of its own."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    real = fastllm.functional.add_rms_norm

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(fastllm.functional, "add_rms_norm", counted)
    return calls


def test_training_and_an_optimizer_built_before():
    model, inputs = build("llama")
    twin = copy.deepcopy(model)
    stock = losses(twin, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fastllm.swap(model)
    found = losses(model, inputs, optimizer=optimizer)
    assert torch.allclose(found, stock, rtol=1e-3)
    assert found[-1] < found[0] - 0.1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_autocast(name):
    model, inputs = build(name)
    model.eval()  # no dropout
    twin = copy.deepcopy(model)
    stock = losses(twin, inputs, autocast=True)
    fastllm.swap(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.dtype == twin(**inputs).logits.dtype
    assert torch.allclose(losses(model, inputs, autocast=True), stock, rtol=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, fused_calls):
    model, inputs = build("llama")
    stock = losses(copy.deepcopy(model), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fastllm.swap(model)
    calls = []
    real = model.model.layers[0]._gradient_checkpointing_func
    model.model.layers[0]._gradient_checkpointing_func = lambda *a: calls.append(1) or real(*a)
    assert torch.allclose(losses(model, inputs, steps=2), stock[:2], rtol=1e-3)
    assert len(calls) == 2, "the rewritten block still checkpoints"
    assert len(fused_calls) == 2 * 2 * 2, "two layers, forward and recomputation, two steps"


def test_checkpointing_enabled_after_the_swap():
    model, inputs = build("llama")
    stock = losses(copy.deepcopy(model), inputs)
    with fastllm.swap(model):
        model.gradient_checkpointing_enable()
        assert torch.allclose(losses(model, inputs), stock, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "backend"), [("llama", "inductor"), ("gemma2", "aot_eager"), ("gpt2", "aot_eager")]
)
def test_compile_fullgraph(name, backend):
    torch._dynamo.reset()
    model, inputs = build(name)
    model.eval()
    model.config.use_cache = False
    fastllm.swap(model)
    model.requires_grad_(True)
    stock = model(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = compiled(**inputs).logits
    assert torch.allclose(found, stock, rtol=1e-3, atol=1e-4)
    upstream = torch.randn(stock.shape)
    params = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(
        torch.autograd.grad(found, params, upstream),
        torch.autograd.grad(stock, params, upstream),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    torch._dynamo.reset()


def test_compiled_graph_holds_the_fused_additions():
    torch._dynamo.reset()
    model, inputs = build("llama")
    model.eval().config.use_cache = False
    fastllm.swap(model)
    targets = []

    def spy(graph, example):
        targets.extend(str(n.target) for n in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=spy)(**inputs)
    assert sum("add_rms_norm" in t for t in targets) == 2
    assert sum("rms_norm" in t for t in targets) == 5
    torch._dynamo.reset()


def test_compiled_model_notices_swap_and_restore():
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
    x = torch.randn(4, 16)
    graphs = []

    def spy(graph, example):
        graphs.append([str(n.target) for n in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(model, backend=spy)
    stock = compiled(x)
    handle = fastllm.swap(model)
    assert torch.allclose(compiled(x), stock, rtol=1e-4, atol=1e-5)
    handle.restore()
    assert torch.equal(compiled(x), stock)
    assert not any("fastllm" in target for target in graphs[0])
    assert any("fastllm" in target for target in graphs[1])
    torch._dynamo.reset()


def test_encoder_fast_path_stays():
    """In eval mode torch's encoder runs one fused kernel on the norms' parameters."""
    model, _ = build("encoder post-norm, batch first")
    model.eval()
    x = torch.randn(2, 7, 32)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    with torch.no_grad():
        stock = model(x, src_key_padding_mask=mask), model(x)
        fastllm.swap(model)
        found = model(x, src_key_padding_mask=mask), model(x)
    for mine, theirs in zip(found, stock, strict=True):
        assert torch.equal(mine, theirs)
    slow = model(x)
    assert torch.allclose(slow, stock[1], rtol=1e-4, atol=1e-5)


def test_peft_lora():
    peft = pytest.importorskip("peft")
    model, inputs = build("llama")
    config = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["model.norm"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    stock = losses(wrapped, inputs)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    report = fastllm.swap(wrapped).report()
    assert report.adds == 2 and report.count("norm") >= 5, str(report)
    assert torch.allclose(losses(wrapped, inputs), stock, rtol=1e-3)
    torch.manual_seed(0)
    handle = fastllm.swap(model)
    wrapped = peft.get_peft_model(model, config)
    assert torch.allclose(losses(wrapped, inputs), stock, rtol=1e-3)
    wrapped.merge_and_unload()
    handle.restore()


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate_hooks(when):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model, inputs = build("llama")
    model.eval()
    stock = model(**inputs).logits
    plain = [type(m) for m in model.modules()]
    devices = {name: "cpu" for name, _ in model.named_children()}
    if when == "before":
        model = accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
        attributes = [list(vars(m).items()) for m in model.modules()]
        handle = fastllm.swap(model)
    else:
        handle = fastllm.swap(model)
        model = accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    norm = model.model.norm
    assert "_old_forward" in vars(norm)
    assert norm._old_forward.__func__ is type(norm).forward is not plain
    assert handle.report().count("norm") == 5 and not handle.report().left
    assert torch.allclose(model(**inputs).logits, stock, rtol=1e-4, atol=1e-5)
    handle.restore()
    assert [type(m) for m in model.modules()] == plain
    assert norm._old_forward.__func__ is type(norm).forward
    if when == "before":
        for m, before in zip(model.modules(), attributes, strict=True):
            assert list(vars(m)) == [name for name, _ in before]
            assert all(vars(m)[name] is value for name, value in before)
    assert torch.equal(model(**inputs).logits, stock)
    remove_hook_from_submodules(model)
    assert torch.equal(model(**inputs).logits, stock)


def test_accelerate_hooks_removed_between():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_submodules

    model, inputs = build("llama")
    model.eval()
    stock = model(**inputs).logits
    devices = {name: "cpu" for name, _ in model.named_children()}
    model = accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    handle = fastllm.swap(model)
    remove_hook_from_submodules(model)
    assert torch.allclose(model(**inputs).logits, stock, rtol=1e-4, atol=1e-5)
    handle.restore()
    assert model.model.norm.forward.__func__ is type(model.model.norm).forward
    assert torch.equal(model(**inputs).logits, stock)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(rank, world, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=120))


def _step(model, inputs):
    model(**inputs).logits.square().mean().backward()


def ddp(order):
    model, inputs = build("llama")
    model.eval()
    twin = copy.deepcopy(model)
    _step(twin, inputs)
    if order == "swap first":
        handle = fastllm.swap(model, verify=inputs)
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
        handle = fastllm.swap(wrapped, verify=inputs)
    assert handle.report().adds == 2 and not handle.report().left, str(handle)
    for _ in range(2):
        wrapped.zero_grad()
        _step(wrapped, inputs)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item())
    handle.restore()
    assert not any(hasattr(type(m), "_fastllm_recipe") for m in wrapped.modules())


def fsdp(order):
    from torch.distributed.fsdp import fully_shard

    def shard(model):
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    model, inputs = build("llama")
    model.eval()
    twin = copy.deepcopy(model)
    _step(twin, inputs)
    if order == "swap first":
        handle = fastllm.swap(model)
        shard(model)
    else:
        shard(model)
        handle = fastllm.swap(model)
    assert handle.report().adds == 2 and handle.report().count("norm") == 5, str(handle)
    assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
    for _ in range(2):
        model.zero_grad()
        _step(model, inputs)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        whole = p.grad.full_tensor()
        assert torch.allclose(whole, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item())
    if order == "swap first":
        with pytest.raises(RuntimeError, match="became a FSDPLlamaDecoderLayer"):
            handle.restore()
    else:
        handle.restore()
        _step(model, inputs)


def every_way(rank, world, port):
    """One process group for all: starting processes is what takes the time."""
    start(rank, world, port)
    try:
        for run in (ddp, fsdp):
            for order in ("swap first", "wrap first"):
                run(order)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2])
def test_ddp_and_fsdp2(world):
    mp.spawn(every_way, (world, free_port()), nprocs=world)
