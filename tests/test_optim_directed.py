"""LAMB, Adafactor and Muon: against torch's where torch has them, else a plain float64 formula."""

import copy

import pytest
import torch
from torch.nn import Parameter

import fastllm
from fastllm import _C, optim
from fastllm.optim import directed

SHAPES = ((300, 100), (100, 300), (33, 65), (7, 1), (130, 129))
VECTORS = ((7,), (), (129,), (2, 5, 9))
LEVELS = _C.isa_levels()


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def parameters(shapes, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]


def copies(params, dtype=None):
    return [Parameter(p.detach().to(dtype or p.dtype).clone()) for p in params]


def train(optimizer, params, steps=50, dtype=torch.float32, seed=1):
    """The parameters after steps with random gradients, the same whatever the parameters' dtype."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            g = g * 10 ** torch.randn((), generator=generator, dtype=torch.float64).clamp(-2, 2)
            p.grad = g.to(dtype).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


def off(values, exact):
    """The relative error of all values as one vector."""
    pairs = list(zip(values, exact, strict=True))
    error = sum((a.double() - b).square().sum() for a, b in pairs)
    return (error / sum(b.square().sum() for _, b in pairs)).sqrt().item()


# ---- Adafactor

ADAFACTOR = [
    {},
    {"lr": 0.1, "weight_decay": 0.1, "beta2_decay": -0.5},
    {"maximize": True, "d": 1.5, "eps": (1e-6, 1e-2)},
]


@pytest.mark.parametrize("options", ADAFACTOR, ids=str)
def test_adafactor_as_torch(options, level):
    start = parameters(SHAPES[:4] + VECTORS)
    floor = options | {"eps": options.get("eps", (1.1920929e-07, 1e-3))}  # float32's, for float64
    ours, stock, exact = copies(start), copies(start), copies(start, torch.float64)
    optimizer = optim.Adafactor(ours, **options)
    made = train(optimizer, ours)
    assert optimizer.backend_used == "cpu"
    plain = train(torch.optim.Adafactor(stock, **options), stock)
    right = train(torch.optim.Adafactor(exact, **floor), exact)
    assert off(made, right) <= 2 * off(plain, right) + 1e-7
    mine, theirs = copies(start, torch.float64), copies(start, torch.float64)
    with fastllm.backend("reference"):
        train(optim.Adafactor(mine, **floor), mine, 5)
    train(torch.optim.Adafactor(theirs, **floor), theirs, 5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_adafactors_state_is_torchs():
    a, b = parameters(SHAPES[:2] + VECTORS), parameters(SHAPES[:2] + VECTORS)
    ours, stock = optim.Adafactor(a), torch.optim.Adafactor(b)
    train(ours, a, 3)
    train(stock, b, 3)
    found, wanted = ours.state_dict(), stock.state_dict()
    assert found["param_groups"] == wanted["param_groups"]
    for number, state in wanted["state"].items():
        assert found["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(found["state"][number][name], value, rtol=1e-4, atol=1e-6)
    # and a run goes on with the other's
    after = optim.Adafactor(b)
    after.load_state_dict(copy.deepcopy(wanted))
    back = torch.optim.Adafactor(a)
    back.load_state_dict(copy.deepcopy(found))
    for x, y in zip(train(after, b, 3, seed=2), train(back, a, 3, seed=2), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# ---- Muon

MUON = [
    {},
    {"lr": 0.02, "momentum": 0.8, "nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3, "weight_decay": 0.5},
]


def exact_muon(params, steps, **options):
    """torch's with Newton-Schulz in float64: the formula without its roundings."""
    import torch.optim._muon as stock

    def zeropower(g, coefficients, rounds, eps):
        a, b, c = coefficients
        x = g.mT if g.shape[0] > g.shape[1] else g
        x = x / x.norm().clamp(min=eps)
        for _ in range(rounds):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.mT if g.shape[0] > g.shape[1] else x

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock, "_zeropower_via_newtonschulz", zeropower)
        return train(torch.optim.Muon(params, **options), params, steps)


@pytest.mark.parametrize("options", MUON, ids=str)
def test_muon_as_torch(options):
    start = parameters((*SHAPES, (33, 65)))
    ours, stock, exact = copies(start), copies(start), copies(start, torch.float64)
    optimizer = optim.Muon(ours, **options)
    made = train(optimizer, ours)
    plain = train(torch.optim.Muon(stock, **options), stock)
    right = exact_muon(exact, 50, **options)
    assert optimizer.backend_used == "cpu"
    assert off(made, right) <= 1.2 * off(plain, right)
    assert optimizer.state_dict()["state"][0].keys() == {"momentum_buffer"}


def test_muon_switches_with_torch():
    a, b = parameters(SHAPES), parameters(SHAPES)
    stock = torch.optim.Muon(a)
    train(stock, a, 4)
    ours = optim.Muon(b)
    train(ours, b, 4)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p)
    made, plain = train(ours, b, 4, seed=3), train(stock, a, 4, seed=3)
    for x, y, p in zip(made, plain, parameters(SHAPES), strict=True):
        assert (x - y).norm() <= 0.02 * (y - p).norm()


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_matrices_together_as_alone(shape):
    """What runs on a device for small matrices: their products in one batch."""
    from fastllm.optim import muon

    rates = optim.Muon([Parameter(torch.randn(shape))])
    s = rates.settings(rates.param_groups[0], 1.0)
    matrices = [torch.randn(shape).bfloat16() for _ in range(3)]
    together, alone = muon.batch(matrices, s), muon.orthogonal(matrices, s)
    for a, b in zip(together, alone, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()
        values = torch.linalg.svdvals(a.float())
        assert values.min() > 0.5 and values.max() < 1.3


# ---- LAMB

LAMBS = [
    {},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.0},
]


class PlainLamb:
    """The paper's formula, one tensor at a time."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, maximize=False
    ):
        self.params, self.t, self.betas, self.eps, self.lr = params, 0, betas, eps, lr
        self.decay, self.sign = weight_decay, -1.0 if maximize else 1.0
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]

    @torch.no_grad()
    def step(self):
        self.t += 1
        one, two = self.betas
        for p, (m, v) in zip(self.params, self.moments, strict=True):
            g = p.grad * self.sign
            m.mul_(one).add_(g, alpha=1 - one)
            v.mul_(two).add_(g * g, alpha=1 - two)
            u = m / (1 - one**self.t) / ((v / (1 - two**self.t)).sqrt() + self.eps) + self.decay * p
            a, b = p.norm(), u.norm()
            p.sub_(u * (self.lr * (a / b if a > 0 and b > 0 else 1.0)))


@pytest.mark.parametrize("options", LAMBS, ids=str)
def test_lamb_as_the_formula(options, level):
    start = parameters(SHAPES[:3] + VECTORS)
    start[0].data.zero_()  # no length of its own: the step is Adam's
    ours, stock, exact = copies(start), copies(start), copies(start, torch.float64)
    optimizer = optim.LAMB(ours, **options)
    made = train(optimizer, ours)
    assert optimizer.backend_used == "cpu"
    plain = train(PlainLamb(stock, **options), stock)
    right = train(PlainLamb(exact, **options), exact)
    assert off(made, right) <= 2 * off(plain, right) + 1e-7


@pytest.mark.parametrize("kept", ["bf16", "int8", "fp8"])
def test_lamb_in_small_states(kept):
    shapes = ((96, 128), (5000,))
    a, b = parameters(shapes), parameters(shapes)
    made = train(optim.LAMB(a, lr=0.01, state_dtype=kept), a, 20)
    full = train(optim.LAMB(b, lr=0.01), b, 20)
    for x, y, p in zip(made, full, parameters(shapes), strict=True):
        assert (x - y).norm() <= 0.25 * (y - p).norm()


# ---- all of them

MAKERS = {
    "LAMB": (optim.LAMB, SHAPES[:3]),
    "Adafactor": (optim.Adafactor, SHAPES[:3]),
    "Muon": (optim.Muon, SHAPES[:3]),
}
ALL = pytest.mark.parametrize("name", MAKERS)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(name, dtype):
    """Parameters in low precision follow the float32 ones as far as they can be rounded."""
    cls, shapes = MAKERS[name]
    wide = parameters(shapes, dtype)
    for how in ("plain", "master_weights", "stochastic_rounding"):
        if how == "stochastic_rounding" and dtype == torch.float16:
            continue
        ours, exact = copies(wide), copies(wide, torch.float32)
        options = {} if how == "plain" else {how: True}
        optimizer = cls(ours, lr=0.01, **options)
        made = train(optimizer, ours, 10, dtype)
        right = train(cls(exact, lr=0.01), exact, 10, dtype)
        for p, a, b in zip(ours, made, right, strict=True):
            if how == "master_weights":
                a = optimizer.state[p]["master_param"]
                assert torch.equal(a.to(dtype), p)
            error = torch.finfo(dtype).eps * 4 if how != "master_weights" else 2e-3
            assert (a.float() - b).norm() <= error * b.norm()


@ALL
def test_clipping_scaling_and_skipped_steps(name):
    cls, shapes = MAKERS[name]
    a, b = parameters(shapes), parameters(shapes)
    ours, plain = cls(a, max_grad_norm=1.0), cls(b)
    for step in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(p.shape)
            p.grad = q.grad * 4
        torch.nn.utils.clip_grad_norm_(b, 1.0)
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(float(step == 2))
        before = [p.detach().clone() for p in a]
        ours.step()
        if step == 2:
            assert all(torch.equal(p, q) for p, q in zip(a, before, strict=True))
        else:
            plain.step()
    tolerance = 0.05 if name == "Muon" else 1e-4  # bfloat16 inside
    for p, q, start in zip(a, b, parameters(shapes), strict=True):
        assert (p - q).norm() <= tolerance * (q - start).norm() + 1e-6


@ALL
def test_threads_resume_and_layouts(name, tmp_path):
    cls, shapes = MAKERS[name]
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        params = parameters(shapes)
        optimizer = cls(params)
        train(optimizer, params, 3)
        if threads == 2:  # and through a file
            torch.save(optimizer.state_dict(), tmp_path / "state.pt")
            optimizer = cls(params)
            optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        results.append(train(optimizer, params, 3, seed=2))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0 if name != "Muon" else 1e-3)
    p = Parameter(torch.randn(40, 30).t())
    q = Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    p.grad = torch.randn(1, 40).expand(30, 40)
    q.grad = p.grad.contiguous()
    cls([p]).step()
    cls([q]).step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@ALL
def test_what_is_refused(name):
    cls, _ = MAKERS[name]
    p = Parameter(torch.randn(4, 3))
    p.grad = torch.eye(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        cls([p]).step()
    p = Parameter(torch.randn(4, 3, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="complex"):
        cls([p]).step()
    with pytest.raises(ValueError):
        cls([p], lr=-1.0)
    with pytest.raises(ValueError, match="max_grad_norm"):
        cls([p], max_grad_norm=0.0)


@ALL
def test_empty_parameters(name):
    cls, shapes = MAKERS[name]
    params = [Parameter(torch.randn(0, 3)), *parameters(shapes)]
    train(cls(params), params, 2)
    assert all(p.isfinite().all() for p in params)


def test_decay_without_a_step():
    """A direction of no length still decays the parameter."""
    p = Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    work = optim.SGD([p]).collect({"params": [p], "momentum": 0, "dampening": 0, "lr": 1.0,
                                    "weight_decay": 0, "nesterov": False}, 0, 1.0)  # fmt: skip
    step = directed._along(work, 0, directed.Way(torch.ones(4, 4), 0.0, 0.5))
    directed.run(directed.SGD, [step], None)
    torch.testing.assert_close(p.detach(), torch.full((4, 4), 0.5))
