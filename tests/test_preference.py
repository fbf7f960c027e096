"""Preference losses against their formulas in float64, over logits that exist."""

import pytest
import torch

import fastllm.nn
from fastllm import functional as FF

IGNORED = -100
B, T, H, C = 4, 7, 12, 83


def batch(rows=2 * B, seed=0):
    """(input, weight, bias, target) with a prompt and padding that count nothing."""
    torch.manual_seed(seed)
    x, w, b = torch.randn(rows, T, H), torch.randn(C, H) / 2, torch.randn(C)
    target = torch.randint(C, (rows, T))
    target[:, :2] = IGNORED
    target[1, 4:] = IGNORED
    return x, w, b, target


def plain_tokens(x, w, b, target):
    """log p of each token, by log_softmax over all logits."""
    log_p = (x @ w.t() + b).log_softmax(-1)
    kept = target != IGNORED
    return log_p.gather(-1, target.where(kept, 0)[..., None])[..., 0] * kept


def plain(x, w, b, target, average=False):
    total = plain_tokens(x, w, b, target).sum(-1)
    return total / (target != IGNORED).sum(-1) if average else total


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


def compare(ours, exact, x, w, b):
    """Loss and gradients of x, w and b: ours in float32, the formula in float64."""
    found = []
    for call, dtype in ((ours, torch.float32), (exact, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        loss = call(*leaves)
        found.append([loss.detach().double()])
        found[-1] += [g.double() for g in torch.autograd.grad(loss * 1.7, leaves)]
    torch.testing.assert_close(found[0], found[1], rtol=2e-5, atol=2e-6)
    assert all(g.any() for g in found[0][1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("own_head", [False, True])
def test_dpo(smoothing, own_head):
    x, w, b, t = batch()
    ref_x, ref_w, ref_b, _ = batch(seed=1)
    head = (ref_w, ref_b) if own_head else (w, b)
    module = fastllm.nn.DPOLoss(beta=0.3, label_smoothing=smoothing, chunk_bytes=2000)

    def ours(x, w, b):
        return module(x, w, t, ref_x, *((ref_w, b, ref_b) if own_head else (None, b)))

    def exact(x, w, b):
        c, r = plain(x, w, b, t).chunk(2)
        rc, rr = plain(ref_x.double(), *(v.double() for v in head), t).chunk(2)
        m = 0.3 * ((c - rc) - (r - rr))
        return -((1 - smoothing) * log_sigmoid(m) + smoothing * log_sigmoid(-m)).mean()

    compare(ours, exact, x, w, b)


def test_cpo():
    x, w, b, t = batch()
    module = fastllm.nn.CPOLoss(beta=0.2, alpha=0.5, chunk_bytes=2000)

    def exact(x, w, b):
        c, r = plain(x, w, b, t).chunk(2)
        return (-log_sigmoid(0.2 * (c - r)) - 0.5 * c).mean()

    compare(lambda x, w, b: module(x, w, t, b), exact, x, w, b)


def test_simpo():
    x, w, b, t = batch()
    module = fastllm.nn.SimPOLoss(beta=2.5, gamma=0.7, chunk_bytes=2000)

    def exact(x, w, b):
        c, r = plain(x, w, b, t, average=True).chunk(2)
        return -log_sigmoid(2.5 * (c - r) - 0.7).mean()

    compare(lambda x, w, b: module(x, w, t, b), exact, x, w, b)


def test_orpo():
    x, w, b, t = batch()
    module = fastllm.nn.ORPOLoss(beta=0.4, chunk_bytes=2000)

    def exact(x, w, b):
        c, r = plain(x, w, b, t, average=True).chunk(2)
        odds = [v.exp() / (1 - v.exp()) for v in (c, r)]
        return (-c - 0.4 * log_sigmoid((odds[0] / odds[1]).log())).mean()

    compare(lambda x, w, b: module(x, w, t, b), exact, x, w, b)


def test_orpo_where_probabilities_are_near_zero_and_one():
    log_p = torch.tensor([-1e-6, -0.3, -0.8, -60.0, -1e4])
    c, r = log_p.clone().requires_grad_(), log_p.flip(0).requires_grad_()
    loss = FF.orpo_loss(c, r, reduction="none")
    wide = [v.detach().double() for v in (c, r)]
    ratio = (wide[0] - wide[1]) - (
        torch.log(-torch.expm1(wide[0])) - torch.log(-torch.expm1(wide[1]))
    )
    exact = -wide[0] - 0.1 * torch.nn.functional.logsigmoid(ratio)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    assert c.grad.isfinite().all() and r.grad.isfinite().all()


@pytest.mark.parametrize("kl", [0.0, -3.0, 0.6])
def test_kto(kl):
    x, w, b, t = batch(B)
    reference = plain(*(v.double() for v in batch(B, seed=1)[:3]), t)
    good = torch.tensor([True, False, False, True])
    module = fastllm.nn.KTOLoss(0.1, 1.5, 0.8, chunk_bytes=2000)

    def exact(x, w, b):
        gain = 0.1 * (plain(x, w, b, t) - reference - max(kl, 0))
        return torch.where(good, 1.5 * (1 - gain.sigmoid()), 0.8 * (1 - (-gain).sigmoid())).mean()

    kl_given = torch.tensor(kl) if kl > 0 else kl
    compare(lambda x, w, b: module(x, w, t, good, reference, kl_given, b), exact, x, w, b)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_grpo(normalization, on_policy):
    x, w, b, t = batch(B)
    kept = t != IGNORED
    gains = torch.randn(B)
    now = plain_tokens(*(v.double() for v in (x, w, b)), t)
    old = None if on_policy else now + 0.4 * torch.randn(B, T)
    reference = now + 0.3 * torch.randn(B, T)
    module = fastllm.nn.GRPOLoss(0.04, 0.2, 0.28, normalization, chunk_bytes=2000)

    def exact(x, w, b):
        p = plain_tokens(x, w, b, t)
        ratio = (p - (p.detach() if on_policy else old)).exp()
        a = gains.double()[:, None]
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        loss = (loss + 0.04 * ((reference - p).exp() - (reference - p) - 1)) * kept
        if normalization == "token":
            return loss.sum() / kept.sum()
        return (loss.sum(-1) / kept.sum(-1)).mean()

    compare(lambda x, w, b: module(x, w, t, gains, old, reference, b), exact, x, w, b)


def test_grpo_ignores_what_masked_tokens_hold():
    log_p, mask = torch.randn(2, 3), torch.tensor([[True, True, False], [False] * 3])
    hostile = log_p.clone()
    hostile[0, 2], hostile[1, 0] = float("nan"), float("-inf")
    leaf = hostile.requires_grad_()
    loss = FF.grpo_loss(leaf, torch.ones(2), mask, log_p - 0.1, log_p - 0.2, beta=0.1)
    loss.backward()
    clean = FF.grpo_loss(log_p, torch.ones(2), mask, log_p - 0.1, log_p - 0.2, beta=0.1)
    assert torch.equal(loss, clean) and not leaf.grad[~mask].any()


def test_all_tokens_ignored_count_nothing():
    x, w, b, t = batch(2)
    t[0] = IGNORED
    for average in (False, True):
        found = FF.sequence_log_probs(x, w, t, b, average=average)
        assert found[0] == 0 and found[1] < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_are_float32(dtype):
    x, w, b, t = (v.to(dtype) if v.is_floating_point() else v for v in batch())
    found = FF.sequence_log_probs(x, w, t, b)
    exact = plain(x.double(), w.double(), b.double(), t)
    stock = (x @ w.t() + b).log_softmax(-1).gather(-1, t.where(t >= 0, 0)[..., None])[..., 0]
    stock = (stock.double() * (t >= 0)).sum(-1)
    assert found.dtype == torch.float32
    budget = 2 * (stock - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= budget


def test_errors_name_the_argument():
    a, b = torch.zeros(3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"rejected: expected the shape of chosen, \[3\]"):
        FF.dpo_loss(a, b, a, a)
    with pytest.raises(ValueError, match="reduction: expected one of"):
        FF.simpo_loss(a, a, reduction="max")
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0 to 0\.5"):
        FF.cpo_loss(a, a, label_smoothing=0.7)
    with pytest.raises(TypeError, match="desirable: expected a bool tensor"):
        FF.kto_loss(a, a, a)
    tokens, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"advantages: expected \[2\] or \[2, 3\]"):
        FF.grpo_loss(tokens, a, mask)
    with pytest.raises(ValueError, match=r"ref_log_probs: expected a tensor, since beta is 0\.1"):
        FF.grpo_loss(tokens, tokens, mask, beta=0.1)
    with pytest.raises(ValueError, match="normalization: expected one of"):
        FF.grpo_loss(tokens, tokens, mask, normalization="batch")
    x, w, _, t = batch(3)
    with pytest.raises(ValueError, match="input: expected an even batch"):
        fastllm.nn.ORPOLoss()(x, w, t)


def test_thirty_steps_of_dpo_prefer_what_was_chosen():
    torch.manual_seed(0)
    x, t = torch.randn(16, 5, 8), torch.randint(30, (16, 5))
    head = torch.nn.Linear(8, 30)
    ref_w, ref_b = head.weight.detach().clone(), head.bias.detach().clone()
    optimizer, loss = torch.optim.AdamW(head.parameters(), lr=0.05), fastllm.nn.DPOLoss(beta=0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(x, head.weight, t, x, ref_w, head.bias, ref_b)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.1 * losses[0]
