"""The fused optimizers against torch's single-tensor ones and against float64."""

import copy
import io

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastllm
from fastllm import _C, optim
from fastllm.core.proof import compare
from fastllm.optim import reference
from fastllm.optim.cases import CASES

QUICK = [pytest.param(c, id=c.name) for c in CASES if "quick" in c.tags]
STOCK = [pytest.param(c, id=c.name) for c in CASES if "quick" in c.tags and c.stock]
LEVELS = _C.isa_levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    assert _C.isa() == request.param
    _C.set_isa(before)


def gradients(params, generator):
    """Random gradients over several orders of magnitude; some steps leave some parameters out."""
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        g = g * 10 ** torch.randn(p.shape, generator=generator, dtype=torch.float64).clamp(-3, 3)
        skip = torch.rand((), generator=generator) < 0.1
        p.grad = None if skip and i else g.float().to(p.dtype)


def train(optimizer, params, steps=50, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        gradients(params, generator)
        optimizer.step()
    return [p.detach().clone() for p in params]


def copies(params, dtype=None):
    return [Parameter(p.detach().to(dtype or p.dtype).clone()) for p in params]


def budget(ours, stock, exact):
    for i, (a, b, c) in enumerate(zip(ours, stock, exact, strict=True)):
        proof = compare(f"parameter {i}", a, b, c)
        assert proof.ok, proof.message


@pytest.mark.parametrize("case", STOCK)
def test_fifty_steps_as_torch(case, level):
    """Parameters after 50 steps are at most twice as far from float64 as torch's own."""
    start = case.params()
    ours, stock, exact = copies(start), copies(start), copies(start, torch.float64)
    optimizer = case.make(ours, **case.options)
    made = train(optimizer, ours)
    assert optimizer.backend_used == "cpu"
    plain = train(case.stock(stock, foreach=False, **case.options), stock)
    right = train(case.stock(exact, foreach=False, **case.options), exact)
    budget(made, plain, right)


@pytest.mark.parametrize("case", [p for p in QUICK if p.values[0].stock is None])
def test_fifty_steps_as_the_reference(case, level):
    start = case.params()
    ours, plain, exact = copies(start), copies(start), copies(start, torch.float64)
    made = train(case.make(ours, **case.options), ours)
    with fastllm.backend("reference"):
        stock = train(case.make(plain, **case.options), plain)
        right = train(case.make(exact, **case.options), exact)
    # a sign may turn where the momentum is within rounding of zero
    for a, b, c in zip(made, stock, right, strict=True):
        off, allowed = (a - c).abs(), 2 * (b - c).abs().max() if c.numel() else 0
        turned = off > allowed + 1e-6
        assert turned.sum() <= max(1, c.numel() // 1000)


@pytest.mark.parametrize("case", QUICK)
def test_reference_is_torch(case):
    """The oracle itself, in float64, is torch's formula."""
    if case.stock is None:
        pytest.skip("torch has no such optimizer")
    start = case.params()
    ours, stock = copies(start, torch.float64), copies(start, torch.float64)
    with fastllm.backend("reference"):
        made = train(case.make(ours, **case.options), ours, 10)
    right = train(case.stock(stock, foreach=False, **case.options), stock, 10)
    for a, b in zip(made, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion])
def test_low_precision(cls, dtype, level):
    """bf16 and fp16 parameters and gradients, with float32 states: closer than torch's."""
    start = [Parameter(torch.randn(s).to(dtype)) for s in ((70, 100), (7,), (513,))]
    options = {"lr": 1e-2} | ({"momentum": 0.9} if cls is optim.SGD else {})
    ours, plain, exact = copies(start), copies(start), copies(start, torch.float64)
    made = train(cls(ours, **options), ours, 10)
    with fastllm.backend("reference"):
        stock = train(cls(plain, **options), plain, 10)
        right = train(cls(exact, **options), exact, 10)
    if cls is not optim.Lion:
        budget(made, stock, right)
    for a, b in zip(made, stock, strict=True):  # the same but for a last digit now and then
        assert (a != b).float().mean() < 0.02


def test_bf16_is_closer_than_torch():
    start = [Parameter(torch.randn(300, 100).bfloat16())]
    ours, stock, exact = copies(start), copies(start), copies(start, torch.float64)
    made = train(optim.AdamW(ours), ours)
    plain = train(torch.optim.AdamW(stock, foreach=False), stock)
    right = train(torch.optim.AdamW(exact, foreach=False), exact)
    budget(made, plain, right)


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8", "fp8"])
def test_threads_do_not_matter(kept):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        params = [Parameter(torch.randn(s)) for s in ((700, 300), (5000,), (3,), (129, 129))]
        optimizer = optim.AdamW(params, state_dtype=kept, max_grad_norm=0.1)
        results.append([*train(optimizer, params, 4), *states_of(optimizer)])
    for other in results[1:]:
        assert all(torch.equal(raw(a), raw(b)) for a, b in zip(results[0], other, strict=True))


def raw(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def states_of(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]


# ---- layouts


def layouts():
    """(name, parameter, gradient) of awkward strides."""
    torch.manual_seed(0)
    base = torch.randn(24, 40)
    yield "transposed parameter", Parameter(base.clone().t()), torch.randn(40, 24)
    yield "transposed gradient", Parameter(base.clone()), torch.randn(40, 24).t()
    yield "both", Parameter(base.clone().t()), torch.randn(24, 40).t()
    yield "expanded gradient", Parameter(base.clone()), torch.randn(1, 40).expand(24, 40)
    yield "strided gradient", Parameter(base.clone()), torch.randn(24, 80)[:, ::2]
    yield "gaps in the parameter", Parameter(torch.randn(24, 80)[:, ::2]), torch.randn(24, 40)
    yield "an offset", Parameter(torch.randn(961)[1:].view(24, 40)), torch.randn(24, 40)
    image = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    yield "channels last", Parameter(image), torch.randn(4, 3, 8, 8)
    yield "negated gradient", Parameter(base.clone()), torch._neg_view(torch.randn(24, 40))
    yield "one row", Parameter(torch.randn(1, 40)), torch.randn(40, 1).t()


@pytest.mark.parametrize("kept", ["fp32", "int8"])
@pytest.mark.parametrize("name, param, grad", [pytest.param(*x, id=x[0]) for x in layouts()])
def test_layouts(name, param, grad, kept, monkeypatch):
    monkeypatch.setattr("fastllm.optim.states.SMALL", 1)
    whole = param.detach()
    gaps = name == "gaps in the parameter"
    around = torch.full((24, 80), 7.0) if gaps else None
    if gaps:
        around[:, ::2] = whole
        param = Parameter(around[:, ::2])
    plain = Parameter(whole.clone(memory_format=torch.contiguous_format))
    ours = optim.AdamW([param], lr=0.1, state_dtype=kept)
    stock = torch.optim.AdamW([plain], lr=0.1, foreach=False)
    for _ in range(3):
        param.grad, plain.grad = grad, grad.contiguous()
        ours.step()
        stock.step()
    if kept == "fp32":
        torch.testing.assert_close(param.detach(), plain.detach(), rtol=1e-5, atol=1e-6)
    else:  # in three steps of 0.1 each
        assert (param - plain).abs().mean() < 0.02
    if gaps:
        assert (around[:, 1::2] == 7.0).all()


def test_gradient_of_another_dtype():
    p, q = Parameter(torch.randn(50).bfloat16()), Parameter(torch.randn(50))
    q.data.copy_(p.data)
    p.grad_dtype = torch.float32
    p.grad = torch.randn(50)
    q.grad = p.grad.clone()
    optim.AdamW([p], lr=0.1).step()
    torch.optim.AdamW([q], lr=0.1).step()
    assert torch.equal(p.detach(), q.detach().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_dtypes(dtype):
    p = Parameter(torch.randn(30, dtype=dtype))
    q = Parameter(p.detach().clone())
    ours, stock = optim.AdamW([p]), torch.optim.AdamW([q], foreach=False)
    for _ in range(3):
        p.grad = torch.randn(30, dtype=dtype)
        q.grad = p.grad.clone()
        ours.step()
        stock.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_sparse_gradients_are_refused():
    p = Parameter(torch.randn(4, 3))
    p.grad = torch.eye(4, 3).to_sparse()
    for cls in (optim.AdamW, optim.SGD, optim.Lion):
        with pytest.raises(RuntimeError, match="sparse"):
            cls([p]).step()


def test_nothing_to_do():
    optim.AdamW([Parameter(torch.randn(3))]).step()
    empty = Parameter(torch.randn(0, 4))
    empty.grad = torch.randn(0, 4)
    optim.AdamW([empty], state_dtype="int8", max_grad_norm=1.0).step()


# ---- what torch promises of an optimizer


@pytest.mark.parametrize("cls", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("back", [False, True], ids=["from torch", "to torch"])
def test_a_run_can_switch(cls, back):
    options = {"lr": 0.01} | ({"momentum": 0.9} if cls == "SGD" else {"amsgrad": True})
    first, second = getattr(torch.optim, cls), getattr(optim, cls)
    if back:
        first, second = second, first
    start = [Parameter(torch.randn(40, 30)), Parameter(torch.randn(9))]
    a, b = copies(start), copies(start)
    before = first(a, **options)
    train(before, a, 5)
    saved = copy.deepcopy(before.state_dict())
    after = second(a, **options)
    after.load_state_dict(saved)
    assert after.state_dict().keys() == saved.keys()
    for x, y in zip(after.state_dict()["state"].values(), saved["state"].values(), strict=True):
        assert x.keys() == y.keys()
    made = train(after, a, 5, seed=2)
    whole = getattr(torch.optim, cls)(b, **options)
    train(whole, b, 5)
    for x, y in zip(made, train(whole, b, 5, seed=2), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_state_dict_is_torchs():
    p = [Parameter(torch.randn(5, 3))]
    p[0].grad = torch.randn(5, 3)
    ours, stock = optim.AdamW(p), torch.optim.AdamW(p)
    ours.step()
    stock.step()
    a, b = ours.state_dict(), stock.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key, value in b["state"][0].items():
        found = a["state"][0][key]
        assert (found.shape, found.dtype, found.device) == (value.shape, value.dtype, value.device)
    assert a["state"][0].keys() == b["state"][0].keys()


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion])
def test_resume_is_bit_identical(kept, cls, tmp_path):
    options = {"lr": 0.01, "state_dtype": kept, "master_weights": True}
    options |= {"momentum": 0.9} if cls is optim.SGD else {}
    params = [Parameter(torch.randn(100, 70)), Parameter(torch.randn(90, 50).bfloat16())]
    params.append(Parameter(torch.randn(9)))
    first = cls(params, **options)
    train(first, params, 3)
    torch.save({"optimizer": first.state_dict(), "params": params}, tmp_path / "run.pt")
    straight = train(first, params, 3, seed=5)
    run = torch.load(tmp_path / "run.pt", weights_only=False)
    again = cls(run["params"], **options)
    again.load_state_dict(run["optimizer"])
    resumed = train(again, run["params"], 3, seed=5)
    for a, b in zip([*straight, *states_of(first)], [*resumed, *states_of(again)], strict=True):
        assert a.dtype == b.dtype and torch.equal(raw(a), raw(b))


def test_safetensors_keep_the_codes(tmp_path):
    from safetensors.torch import load_file, save_file

    p = [Parameter(torch.randn(100, 70))]
    optimizer = optim.AdamW(p, state_dtype="int8")
    train(optimizer, p, 2)
    flat = dict(optimizer.state_dict()["state"][0])
    save_file(flat, tmp_path / "state.safetensors")
    saved = optimizer.state_dict()
    saved["state"] = {0: load_file(tmp_path / "state.safetensors")}
    other = optim.AdamW(p, state_dtype="int8")
    other.load_state_dict(saved)
    for name, value in optimizer.state[p[0]].items():
        found = other.state[p[0]][name]
        assert found.dtype == value.dtype and torch.equal(found, value)


def test_pickle_and_deepcopy():
    p = [Parameter(torch.randn(100, 70))]
    optimizer = optim.AdamW(p, state_dtype="int8", max_grad_norm=1.0)
    train(optimizer, p, 2)
    stream = io.BytesIO()
    torch.save(optimizer, stream)
    stream.seek(0)
    for other in (copy.deepcopy(optimizer), torch.load(stream, weights_only=False)):
        assert other.state_dtype == "int8" and other.max_grad_norm == 1.0
        train(other, other.param_groups[0]["params"], 1)


def test_groups_schedulers_hooks_closure():
    torch.manual_seed(0)
    results = []
    for cls in (optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        groups = [
            {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.0},
            {"params": model[2].parameters()},
        ]
        optimizer = cls(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
        calls = []
        optimizer.register_step_pre_hook(lambda *a, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *a, calls=calls: calls.append("post"))
        x, y = torch.randn(32, 8), torch.randn(32, 1)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(10):
            losses.append(optimizer.step(closure).item())
            schedule.step()
        assert calls == ["pre", "post"] * 10
        results.append([torch.tensor(losses), *[p.detach() for p in model.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_version_counter():
    p = Parameter(torch.randn(3))
    p.grad = torch.randn(3)
    before = p._version
    optim.AdamW([p]).step()
    assert p._version > before


def test_settings_are_checked():
    p = [Parameter(torch.randn(3))]
    for wrong in ({"state_dtype": "int4"}, {"max_grad_norm": 0.0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("lr", "learning rate")):
            optim.AdamW(p, **wrong)
    half = Parameter(torch.randn(3).half())
    half.grad = torch.randn(3).half()
    with pytest.raises(ValueError, match="stochastic_rounding"):
        optim.AdamW([half], stochastic_rounding=True).step()
    with fastllm.backend("triton"), pytest.raises(fastllm.UnsupportedError, match="triton"):
        p[0].grad = torch.randn(3)
        optim.AdamW(p).step()


def test_stock_backend():
    p = [Parameter(torch.randn(30))]
    q = copies(p)
    p[0].grad = torch.randn(30)
    q[0].grad = p[0].grad.clone()
    ours = optim.AdamW(p)
    calls = []
    ours.register_step_post_hook(lambda *a: calls.append(1))
    torch.optim.AdamW(q).step()
    with fastllm.backend("torch"):
        ours.step()
    assert ours.backend_used == "torch" and calls == [1]
    assert torch.equal(p[0], q[0])
    with fastllm.backend("torch"), pytest.raises(fastllm.UnsupportedError, match="int8"):
        optim.AdamW(p, state_dtype="int8").step()


def test_differentiable_is_torchs():
    p = torch.randn(4, requires_grad=True)
    q = p.clone()
    q.grad = torch.randn(4, requires_grad=True)
    optimizer = optim.AdamW([torch.zeros(1, requires_grad=True)], differentiable=True)
    optimizer.param_groups[0]["params"] = [q]
    optimizer.step()
    assert optimizer.backend_used == "torch" and q.requires_grad


def test_reference_names_every_kind():
    from fastllm.optim import settings

    assert set(reference.RULES) == {settings.ADAM, settings.SGD, settings.LION}
