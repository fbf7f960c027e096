"""Around the step: 8-bit states, low-precision parameters, loss scaling, clipping, accumulation."""

import copy

import pytest
import torch
from torch.nn import Parameter

import fastllm
from fastllm import _C, optim
from fastllm.optim import states

LEVELS = _C.isa_levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


# ---- states in fewer bytes


@pytest.mark.parametrize("kept", ["bf16", "int8", "fp8"])
def test_states_are_the_references(kept, level):
    """The kernels' codes are those of plain torch, but for the last rounding now and then."""
    found = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        p = Parameter(torch.randn(77, 101))
        optimizer = optim.AdamW([p], state_dtype=kept, lr=0.01)
        for _ in range(5):
            p.grad = torch.randn(77, 101) * 10 ** torch.randn(77, 101)
            with fastllm.backend(backend):
                optimizer.step()
        found.append((p.detach(), optimizer.state[p]))
    (p, a), (q, b) = found
    assert (p - q).abs().mean() < 1e-5
    for name, value in a.items():
        x, y = value, b[name]
        if value.element_size() == 1:
            x, y = value.view(torch.uint8).int(), y.view(torch.uint8).int()
            assert (x != y).float().mean() < 0.002
            continue
        assert (x.float() - y.float()).abs().max() <= 0.02 * y.float().abs().max() + 1e-6


@pytest.mark.parametrize("kept", ["int8", "fp8"])
@pytest.mark.parametrize("place", [0, 1])
def test_codes_are_unbiased_and_close(kept, place):
    code = states.CODES[kept, place]
    x = torch.randn(256) * 10 ** torch.randn(256)
    x = x if code.signed else x.square()
    draws = 400
    total = torch.zeros(256, dtype=torch.float64)
    for key in range(1, draws + 1):
        codes, scales = states.encode(x, code, states.mixed(key))
        total += states.decode(codes, scales, code)
    mean = total / draws
    scale = scales.repeat_interleave(states.BLOCK)
    low = code.low(x.abs() / scale * code.unit)
    gap = (code.value(low + 1) - code.value(low)).nan_to_num(0) * scale / code.unit
    sigma = gap / 2 / draws**0.5
    # the lowest code of a second moment is kept above zero
    free = x > scale * 1e-5 if not code.signed else torch.ones(256, dtype=torch.bool)
    off = (mean - x).abs() - 4.5 * sigma - 2e-5 * x.abs() - 1e-9
    assert (off[free] <= 0).all()
    nearest = states.decode(*states.encode(x, code, 0), code)
    large = x.abs() > 0.01 * scale
    assert ((nearest - x).abs() <= 0.1 * x.abs())[large].all()


@pytest.mark.parametrize("kept, most", [("bf16", 0.5), ("int8", 0.27), ("fp8", 0.27)])
def test_bytes_of_states(kept, most):
    p = Parameter(torch.randn(512, 512))
    p.grad = torch.randn(512, 512)
    sizes = []
    for name in ("fp32", kept):
        optimizer = optim.AdamW([p], state_dtype=name)
        optimizer.step()
        sizes.append(sum(v.nbytes for k, v in optimizer.state[p].items() if k != "step"))
    assert sizes[1] <= most * sizes[0]


def test_small_tensors_keep_float32():
    p = Parameter(torch.randn(states.SMALL - 1))
    p.grad = torch.randn_like(p)
    optimizer = optim.AdamW([p], state_dtype="int8")
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-40, 1e30])
def test_hostile_gradients(value, level):
    """What is not finite poisons its own block and no other; zeros stay zeros."""
    p = Parameter(torch.ones(4, 1024))
    optimizer = optim.AdamW([p], state_dtype="int8", lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(4, 1024)
    p.grad[1, 3] = value
    optimizer.step()
    optimizer.step()
    blocks = p.detach().view(-1, states.BLOCK)
    hit = 1024 // states.BLOCK
    assert (blocks[:hit] == 1).all() and (blocks[hit + 1 :] == 1).all()
    if value != value:
        assert p[1, 3].isnan()


@pytest.mark.parametrize("kept, error", [("bf16", 0.003), ("int8", 0.03), ("fp8", 0.07)])
def test_formats_convert_on_load(kept, error):
    p = Parameter(torch.randn(100, 70))
    full = optim.AdamW([p])
    for _ in range(3):
        p.grad = torch.randn(100, 70)
        full.step()
    small = optim.AdamW([p], state_dtype=kept)
    small.load_state_dict(copy.deepcopy(full.state_dict()))
    back = optim.AdamW([p])
    back.load_state_dict(copy.deepcopy(small.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        a, b = full.state[p][name], back.state[p][name]
        assert b.dtype == torch.float32
        assert (a - b).norm() <= error * a.norm()
    assert list(back.state[p]) == list(full.state[p])


def test_codes_of_version_1_are_read():
    """int8 states as they were saved before: c |c| / 127^2 in int8 and (c / 255)^4 in uint8."""
    torch.manual_seed(0)
    p = Parameter(torch.randn(100, 70))
    p.grad = torch.randn(100, 70)
    optimizer = optim.AdamW([p], state_dtype="int8")
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    state, scales = saved["state"][0], torch.rand(states.scales_of(7000)) + 0.5
    first = torch.randint(-127, 128, (100, 70), dtype=torch.int8)
    second = torch.randint(1, 256, (100, 70)).to(torch.uint8)
    state |= {"exp_avg": first, "exp_avg_scale": scales}
    state |= {"exp_avg_sq": second, "exp_avg_sq_scale": scales}
    spread = scales.repeat_interleave(states.BLOCK)[:7000].view(100, 70)
    means = first.double() * first.double().abs() / 127**2, (second.double() / 255) ** 4
    for kept in ("fp32", "int8"):
        read, other = optim.AdamW([p], state_dtype=kept), optim.AdamW([p])
        read.load_state_dict(copy.deepcopy(saved))
        assert read.state[p]["exp_avg"].dtype == (torch.uint8 if kept == "int8" else torch.float32)
        other.load_state_dict(copy.deepcopy(read.state_dict()))
        for name, mean in zip(("exp_avg", "exp_avg_sq"), means, strict=True):
            off = other.state[p][name].double() - mean * spread
            assert off.norm() <= (1e-6 if kept == "fp32" else 0.03) * (mean * spread).norm()


def test_a_second_moment_never_vanishes():
    """Next to one huge gradient, small ones keep steps of their own size: no endless step."""
    torch.manual_seed(0)
    p = Parameter(torch.zeros(64, 128))
    optimizer = optim.AdamW([p], lr=1e-3, state_dtype="int8", weight_decay=0.0)
    for _ in range(100):
        before = p.detach().clone()
        p.grad = torch.randn(64, 128) * 1e-6
        p.grad[:, 0] = torch.randn(64)
        optimizer.step()
        assert (p - before).abs().max() < 20e-3


# ---- parameters in low precision


@pytest.mark.parametrize("how", ["master_weights", "stochastic_rounding"])
def test_small_steps_add_up(how, level):
    """p = 1 moves by 1e-3 a step in bfloat16, as it never would with plain rounding."""
    p = Parameter(torch.ones(10_000).bfloat16())
    optimizer = optim.AdamW([p], lr=1e-3, weight_decay=0.0, **{how: True})
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    kept = optimizer.state[p].get("master_param", p)
    assert abs(kept.float().mean().item() - 0.99) < 5e-4
    assert how == "stochastic_rounding" or torch.equal(p, kept.bfloat16())
    q = Parameter(torch.ones(4).bfloat16())
    stuck = torch.optim.AdamW([q], lr=1e-3, weight_decay=0.0)
    q.grad = torch.ones_like(q)
    stuck.step()
    assert (q == 1).all()


def test_stochastic_rounding_is_unbiased(level):
    """10000 draws of one step from 1 by 1e-3: the mean within 4 sigma, both neighbours seen."""
    p = Parameter(torch.ones(10_000).bfloat16())
    p.grad = torch.ones_like(p)
    optim.SGD([p], lr=1e-3, stochastic_rounding=True).step()
    values = p.detach().double()
    assert values.unique().tolist() == [1 - 2**-8, 1.0]
    share = 1e-3 * 2**8
    sigma = (share * (1 - share) / 10_000) ** 0.5 * 2**-8
    assert abs(values.mean().item() - (1 - 1e-3)) < 4 * sigma


def test_random_bits_differ_by_step_tensor_and_seed():
    keys = {states.key_of(s, n, t) for s in range(5) for n in range(5) for t in range(1, 6)}
    assert len(keys) == 125
    bits = states.random_bits(states.key_of(0, 1, 2), 100_000, torch.device("cpu"))
    draws = [
        [states.random_bits(states.key_of(0, 0, t), 8, torch.device("cpu"), s)[5] for s in (1, 0)]
        for t in range(2000)
    ]  # of one element, for its two moments
    assert abs(torch.corrcoef(torch.tensor(draws).double().T)[0, 1]) < 4 / 2000**0.5
    for shift in (0, 7):
        share = ((bits >> shift) & 0xFFFF).double() / 65536
        assert abs(share.mean() - 0.5) < 4 * (1 / 12 / 100_000) ** 0.5
        assert abs(torch.corrcoef(torch.stack([share[1:], share[:-1]]))[0, 1]) < 0.015


# ---- loss scaling and clipping


def model_and_data(dtype=torch.float32):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    return model.to(dtype), torch.randn(8, 32, 16).to(dtype), torch.randn(8, 32, 1).to(dtype)


@pytest.mark.parametrize("scaler_class", [optim.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_grad_scaler(scaler_class, clip):
    """Scaled, unscaled and clipped within the step: torch's three calls, and its skipped steps."""
    runs = []
    for ours in (True, False):
        model, xs, ys = model_and_data()
        scaler = (scaler_class if ours else torch.amp.GradScaler)("cpu", init_scale=2.0**10)
        if ours:
            optimizer = optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=clip)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if i == 3:
                model[0].weight.grad[2, 3] = float("inf")
            if not ours and clip:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
        runs.append((scaler.get_scale(), [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0] == 2.0**9
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_found_inf_touches_nothing(kept):
    p = Parameter(torch.randn(100, 70))
    optimizer = optim.AdamW([p], state_dtype=kept)
    p.grad = torch.randn(100, 70)
    optimizer.step()
    before = [p.detach().clone(), *[v.clone() for v in optimizer.state[p].values()]]
    grad = p.grad.clone()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    after = [p.detach(), *optimizer.state[p].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(p.grad, grad)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not torch.equal(p, before[0]) and torch.equal(p.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(dtype, max_norm, level):
    shapes = ((100, 70), (5,), (), (0, 3), (20_000,))
    a = [Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    b = [Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn(p.shape, dtype=dtype)
        q.grad = p.grad.clone()
    exact = torch.cat([p.grad.double().flatten() for p in a]).norm()
    norm = optim.clip_grad_norm_((p for p in a), max_norm)
    stock = torch.nn.utils.clip_grad_norm_(b, max_norm)
    assert norm.dtype == stock.dtype and norm.shape == stock.shape
    eps = torch.finfo(dtype).eps
    assert abs(norm.double() - exact) <= 2 * abs(stock.double() - exact) + eps * exact
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=4 * eps, atol=4 * eps)


def test_clip_grad_norm_corners():
    p = Parameter(torch.zeros(3, 4))
    p.grad = torch.randn(1, 4).expand(3, 4).t().contiguous().t()
    p.grad[0, 0] = 1e30  # its square is beyond float32
    assert optim.clip_grad_norm_(p, 1.0).item() == pytest.approx(1e30)
    p.grad[0, 0] = float("inf")
    with pytest.raises(RuntimeError, match="non-finite"):
        optim.clip_grad_norm_(p, 1.0, error_if_nonfinite=True)
    assert optim.clip_grad_norm_(p, 1.0).item() == float("inf")
    assert optim.clip_grad_norm_([Parameter(torch.zeros(3))], 1.0).item() == 0
    q = Parameter(torch.zeros(3, 4))
    q.grad = torch.randn(3, 8)[:, ::2]
    want = q.grad.abs().max().item()
    assert optim.clip_grad_norm_(q, 0.1, norm_type=float("inf")).item() == pytest.approx(want)


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_max_grad_norm_is_clipping(kept):
    runs = []
    for fold in (True, False):
        torch.manual_seed(0)
        p = [Parameter(torch.randn(90, 80)), Parameter(torch.randn(7))]
        optimizer = optim.AdamW(p, 0.01, state_dtype=kept, max_grad_norm=1.0 if fold else None)
        for _ in range(4):
            for x in p:
                x.grad = torch.randn_like(x)
            if not fold:
                norm = torch.nn.utils.clip_grad_norm_(p, 1.0)
            optimizer.step()
        runs.append(p)
        if fold:
            found = optimizer.grad_norm
    assert found == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(*runs, strict=True):
        assert (a - b).abs().mean() < (1e-6 if kept == "fp32" else 1e-3)


# ---- accumulation, the step in backward


def test_accumulation_in_float32():
    model, xs, ys = model_and_data(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    assert optim.accumulate_grad(model) is model
    plain = copy.deepcopy(model)
    for p in plain.parameters():
        p.grad_dtype = torch.bfloat16
    for _ in range(8):
        for x, y in zip(xs, ys, strict=True):
            for m in (model, plain, exact):
                dtype = next(m.parameters()).dtype
                (m(x.to(dtype)) - y.to(dtype)).square().mean().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    grads = [torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (model, plain)]
    right = torch.cat([p.grad.flatten() for p in exact.parameters()])
    assert (grads[0] - right).norm() < 0.8 * (grads[1] - right).norm()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    optimizer.step()
    assert optimizer.backend_used == "cpu"
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(TypeError, match="dtype"):
        optim.accumulate_grad(model, torch.int32)
    with pytest.raises(ValueError, match="grad"):
        optim.accumulate_grad(model, torch.float64)


def test_step_in_backward():
    runs = []
    for inside in (True, False):
        model, xs, ys = model_and_data()
        if inside:
            handle = optim.step_in_backward(model, lambda p: optim.AdamW(p, lr=0.01))
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for x, y in zip(xs, ys, strict=True):
            (model(x) - y).square().mean().backward()
            if inside:
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    model, xs, ys = model_and_data()
    handle = optim.step_in_backward(model, optim.AdamW)
    model(xs[0]).sum().backward()
    handle.load_state_dict(handle.state_dict())
    handle.remove()
    model(xs[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="max_grad_norm"):
        optim.step_in_backward(model, lambda p: optim.AdamW(p, max_grad_norm=1.0))


# ---- torch's own step


@pytest.mark.parametrize("cls", [optim.AdamW, optim.Adam, optim.SGD])
def test_other_devices_are_torchs(cls):
    """Never slower: where no kernel is, torch's own multi-tensor step runs."""
    p = Parameter(torch.empty(30, 7, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = cls([p])
    optimizer.step()
    assert optimizer.backend_used == "torch"


def test_torchs_step_leaves_gradients_alone():
    """Unscaled and clipped for torch's step, while p.grad stays the tensor that it was."""
    p, q = Parameter(torch.ones(30)), Parameter(torch.ones(30))
    grad = torch.randn(30) * 4
    p.grad, q.grad = grad, grad / 4
    before = grad.clone()
    torch.nn.utils.clip_grad_norm_([q], 0.1)
    torch.optim.SGD([q], lr=1.0).step()
    ours = optim.SGD([p], lr=1.0, max_grad_norm=0.1)
    ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    with fastllm.backend("torch"):
        ours.step()
    assert p.grad is grad and torch.equal(grad, before)
    torch.testing.assert_close(p, q)


def test_bench_subjects_prove_themselves():
    from fastllm.core import subject
    from fastllm.optim import subjects  # noqa: F401

    found = [s for name in ("AdamW", "SGD") for s in subject.SUBJECTS[name].scenarios]
    assert {"67M", "67M-int8", "500x1000", "300x20k"} <= {s.name for s in found}
    assert [s.wrong("cpu") for s in found] == [None] * len(found)
