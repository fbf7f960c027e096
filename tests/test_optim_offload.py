"""CPUOffload: the same parameters as without it, whatever lies where."""

import copy

import pytest
import torch
from torch.nn import Parameter

from fastllm import optim
from fastllm.optim.offload import CPUOffload

SHAPES = ((300, 100), (7,), (33, 65), (), (5000,))


class Away(CPUOffload):
    """Every parameter counts as one of another device, whose transfers are copies at once."""

    def _is_away(self, p):
        return True


def parameters(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def train(optimizer, params, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator)
            p.grad = None if (step + i) % 5 == 0 else g.to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("wrap", [CPUOffload, Away])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5}, {"state_dtype": "int8", "max_grad_norm": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("bucket", [1, 20_000, 1 << 30])
def test_as_without_it(wrap, options, bucket):
    a, b = parameters(), parameters()
    made = train(wrap(optim.AdamW(a, lr=0.01, **options), bucket), a)
    plain = train(optim.AdamW(b, lr=0.01, **options), b)
    assert all(torch.equal(x, y) for x, y in zip(made, plain, strict=True))


@pytest.mark.parametrize("cls", [optim.SGD, optim.Lion, optim.LAMB, optim.Adafactor])
def test_other_optimizers(cls):
    a, b = parameters(), parameters()
    made = train(Away(cls(a, lr=0.01), 1), a)
    plain = train(cls(b, lr=0.01), b)
    assert all(torch.equal(x, y) for x, y in zip(made, plain, strict=True))


def test_low_precision_with_master_weights_and_float32_gradients():
    a, b = parameters(torch.bfloat16), parameters(torch.bfloat16)
    for p in (*a, *b):
        p.grad_dtype = torch.float32
    ours = Away(optim.AdamW(a, lr=0.01, master_weights=True), 1)
    plain = optim.AdamW(b, lr=0.01, master_weights=True)
    for _ in range(4):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_loss_scaling_and_schedules():
    runs = []
    for wrap in (Away, lambda o: o):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 1))
        optimizer = wrap(optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=0.1))
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        scaler = optim.GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(4, 8)).square().mean()).backward()
            if step == 2:
                model[0].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        runs.append((scaler.get_scale(), [p.detach() for p in model.parameters()]))
    assert runs[0][0] == runs[1][0] == 512.0
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kept", ["fp32", "int8"])
def test_resume_and_written_parameters(kept):
    """A checkpoint goes on bit by bit, and so does a run whose parameters somebody has written."""
    a, b = parameters(), parameters()
    first = Away(optim.AdamW(a, lr=0.01, state_dtype=kept), 1)
    plain = optim.AdamW(b, lr=0.01, state_dtype=kept)
    train(first, a)
    train(plain, b)
    saved = copy.deepcopy(first.state_dict())
    second = Away(optim.AdamW(a, lr=0.5, state_dtype=kept), 1)
    second.load_state_dict(saved)
    assert second.param_groups[0]["lr"] == 0.01
    with torch.no_grad():
        for p in (*a, *b):
            p.mul_(0.5)
    made, right = train(second, a, seed=2), train(plain, b, seed=2)
    assert all(torch.equal(x, y) for x, y in zip(made, right, strict=True))
    with torch.no_grad():
        for p in (*a, *b):
            p.mul_(0.5)
    made, right = train(second, a, seed=3), train(plain, b, seed=3)
    assert all(torch.equal(x, y) for x, y in zip(made, right, strict=True))


def test_what_is_refused():
    params = parameters()
    with pytest.raises(TypeError, match=r"fastllm\.optim"):
        CPUOffload(torch.optim.AdamW(params))
    with pytest.raises(ValueError, match="bucket"):
        CPUOffload(optim.AdamW(params), 0)
    stepped = optim.AdamW(params)
    train(stepped, params, 1)
    with pytest.raises(ValueError, match="stepped"):
        CPUOffload(stepped)
    wrapped = CPUOffload(optim.AdamW(params))
    with pytest.raises(ValueError, match="param_group"):
        wrapped.add_param_group({"params": [Parameter(torch.randn(3))]})


@pytest.mark.gpu
def test_on_a_device():
    a = [Parameter(p.detach().cuda()) for p in parameters()]
    b = parameters()
    ours = CPUOffload(optim.AdamW(a, lr=0.01, max_grad_norm=0.5), 1)
    plain = optim.AdamW(b, lr=0.01, max_grad_norm=0.5)
    for _ in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.cuda()
        ours.step()
        plain.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-5, atol=1e-6)
