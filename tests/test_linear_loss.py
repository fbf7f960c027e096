"""Losses out of hidden states: low-rank weights, shards, skipped parts, distillation."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import fastllm.nn
from fastllm import functional as FF
from fastllm.core.proof import compare

IGNORED = -100


def head(tokens=37, features=16, classes=700, dtype=torch.float32):
    x = torch.randn(tokens, features).to(dtype)
    w = (torch.randn(classes, features) / 4).to(dtype)
    target = torch.randint(classes, (tokens,))
    target[2] = IGNORED
    return x, w, target


def gradients(call, tensors, upstream=None):
    """(loss, gradients) of call(*leaves)."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = call(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def within_budget(ours, stock, exact):
    for i, triple in enumerate(zip(ours, stock, exact, strict=True)):
        proof = compare(f"result {i}", *triple)
        assert proof.ok, proof.message


# ---- low-rank weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_rank_weight(dtype, reduction):
    x, w, t = head(dtype=dtype)
    a, b = torch.randn(4, 16).to(dtype), torch.randn(700, 4).to(dtype) / 8
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(0.6)

    def ours(x, w, a, b):
        return FF.linear_cross_entropy(
            x, w, t, lora_a=a, lora_b=b, lora_scale=0.5, reduction=reduction, chunk_bytes=9000,
            dtype=torch.float32,
        )  # fmt: skip

    def stock(x, w, a, b):  # as PEFT computes it
        logits = F.linear(x, w) + F.linear(F.linear(x, a), b) * 0.5
        kind = torch.promote_types(x.dtype, torch.float32)
        return F.cross_entropy(logits.to(kind), t, reduction=reduction)

    found = [gradients(call, (x, w, a, b), upstream) for call in (ours, stock)]
    double = [v.double() for v in (x, w, a, b)]
    within_budget(*found, gradients(stock, double, upstream.double()))


def test_low_rank_weight_reads_its_own_input_in_its_own_dtype():
    x, w, t = head(dtype=torch.bfloat16)
    a, b = torch.randn(4, 16), torch.randn(700, 4) / 8
    mask = (torch.rand(37, 16) < 0.5) * 2.0  # a dropout

    def ours(x, a, b):
        return FF.linear_cross_entropy(
            x, w, t, lora_a=a, lora_b=b, lora_input=x * mask, dtype=torch.float32
        )

    def stock(x, a, b):  # as PEFT computes it, and transformers the loss
        base, dropped = F.linear(x, w.to(x.dtype)), (x * mask.to(x.dtype)).to(a.dtype)
        logits = (base + F.linear(F.linear(dropped, a), b)).to(x.dtype)
        return F.cross_entropy(logits.to(a.dtype), t)

    exact = [v.double() for v in (x, a, b)]
    found = [gradients(ours, (x, a, b)), gradients(stock, (x, a, b)), gradients(stock, exact)]
    within_budget(*found)
    with pytest.raises(ValueError, match="lora_input: expected None without lora_a"):
        FF.linear_cross_entropy(x, w, t, lora_input=x)
    with pytest.raises(ValueError, match="lora_input: expected input's shape"):
        FF.linear_cross_entropy(x, w, t, lora_a=a, lora_b=b, lora_input=x[1:])


def test_low_rank_weight_with_a_frozen_base():
    x, w, t = head()
    a, b = torch.randn(4, 16, requires_grad=True), torch.zeros(700, 4, requires_grad=True)
    FF.linear_cross_entropy(x, w, t, lora_a=a, lora_b=b).backward()
    assert w.grad is None and b.grad.any() and not a.grad.any()  # b is 0 at the start
    with pytest.raises(ValueError, match="lora_a and lora_b: expected both or neither"):
        FF.linear_cross_entropy(x, w, t, lora_a=a)
    with pytest.raises(ValueError, match="up: expected rank 4, found 3"):
        FF.linear_cross_entropy(x, w, t, lora_a=a, lora_b=torch.zeros(700, 3))


# ---- parts that are skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipping_is_off_unless_asked_for_and_keeps_its_bound(dtype):
    """Classes that nobody predicts, 2048 of them, lie in parts of their own."""
    x, w, t = head(24, 8, 2560)
    w[512:] *= 0.01
    x = x.abs() + 1
    w[:512] = w[:512].abs()
    t = t % 512
    t[2] = IGNORED
    x, w = x.to(dtype), w.to(dtype)

    def call(skip, **options):
        return gradients(
            lambda x, w: FF.linear_cross_entropy(
                x, w, t, skip_below=skip, chunk_bytes=1, reduction="sum", dtype=torch.float32,
                **options,
            ),
            (x * 8, w),
        )  # fmt: skip

    exact, plain, skipped = call(0.0), call(1e-30), call(0.01)
    assert torch.equal(exact[0], skipped[0])  # the loss is exact
    for a, b in zip(exact[1:], plain[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)
    assert not skipped[2][512:].any() and exact[2][512:].any()
    # 0.01 of a token's logit gradient for each of the ten blocks, times the largest weight
    assert (exact[1] - skipped[1]).abs().max() <= 0.01 * 10 * w.abs().max()
    smooth = [call(skip, label_smoothing=0.1) for skip in (1e-30, 0.01)]
    assert torch.equal(smooth[0][2], smooth[1][2])  # every class counts: nothing is left out
    with pytest.raises(ValueError, match="skip_below: expected 0"):
        call(1.0)


def test_skipping_by_reference_is_exact_and_compiles():
    x, w, t = head(dtype=torch.float64)
    exact = FF.linear_cross_entropy(x, w, t)
    assert FF.linear_cross_entropy(x, w, t, skip_below=0.5) == exact
    x, w = x.float().requires_grad_(), w.float()
    step = torch.compile(
        lambda x: FF.linear_cross_entropy(x, w, t, skip_below=1e-4),
        fullgraph=True,
        backend="aot_eager",
    )
    (ours,) = torch.autograd.grad(step(x), x)
    (stock,) = torch.autograd.grad(F.cross_entropy(F.linear(x, w), t), x)
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-5)


# ---- traps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_targets_and_logits(dtype):
    """p -> 1, logits to +-300, only the last token of each sequence, all tokens ignored."""
    x, w, t = head(96, 8, 600, dtype)
    # whole numbers: logits are exact, or rounded alike, whatever the order of their sums
    x, w = torch.randint(-3, 4, x.shape).to(dtype), torch.randint(-3, 4, w.shape).to(dtype) / 4
    w[5], t[0] = x[0], 5
    big = w * (300 // (x.float() @ w.float().t()).abs().max().item())
    last, none = t.clone(), torch.full_like(t, IGNORED)
    last.view(8, 12)[:, :-1] = IGNORED
    for weight in (w, big):
        for target in (t, last, none):
            for reduction in ("sum", "none"):
                upstream = torch.randn(96) if reduction == "none" else torch.tensor(1.0)

                def ours(x, w, target=target, reduction=reduction):
                    return FF.linear_cross_entropy(
                        x, w, target, reduction=reduction, chunk_bytes=6000, dtype=torch.float32
                    )

                def stock(x, w, target=target, reduction=reduction):
                    kind = torch.promote_types(x.dtype, torch.float32)
                    return F.cross_entropy(F.linear(x, w).to(kind), target, reduction=reduction)

                found = [gradients(call, (x, weight), upstream) for call in (ours, stock)]
                exact = gradients(stock, (x.double(), weight.double()), upstream.double())
                within_budget(*found, exact)
    assert FF.linear_cross_entropy(x, w, none).isnan()
    assert FF.linear_cross_entropy(x, w, none, reduction="sum") == 0
    zero = torch.zeros(600)
    assert FF.linear_cross_entropy(x, w, t, class_weight=zero).isnan()
    assert FF.linear_cross_entropy(x, w, t, class_weight=zero, reduction="sum") == 0


def test_the_loss_keeps_float32_where_it_is_asked_for():
    x, w, t = head(dtype=torch.bfloat16)
    exact = F.cross_entropy((x.double() @ w.double().t()), t)
    ours = FF.linear_cross_entropy(x, w, t, dtype=torch.float32)
    assert ours.dtype == torch.float32 and abs(ours - exact) < 2e-3 * exact
    assert FF.linear_cross_entropy(x, w, t).dtype == torch.bfloat16


# ---- shards of the vocabulary


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def sharded(rank, port):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    group = dist.group.WORLD
    cut = slice(0, 400) if rank == 0 else slice(400, 700)  # of two sizes
    for dtype in (torch.float32, torch.bfloat16):
        x, w, t = head(dtype=dtype)
        b, up = torch.randn(700).to(dtype), torch.randn(700, 3).to(dtype) / 4
        a, class_weight = torch.randn(3, 16).to(dtype), torch.rand(700)
        for options in (
            {"reduction": "mean"},
            {"reduction": "none", "z_loss": 0.01},
            {"reduction": "sum", "label_smoothing": 0.1, "softcap": 20.0},
        ):
            options |= {"class_weight": class_weight, "chunk_bytes": 9000, "dtype": torch.float32}
            upstream = torch.randn(37) if options["reduction"] == "none" else torch.tensor(0.7)

            def call(x, w, b, a, up, group=None, options=options, t=t):
                return FF.linear_cross_entropy(
                    x, w, t, b, lora_a=a, lora_b=up, lora_scale=0.5, process_group=group, **options
                )

            whole = gradients(call, (x, w, b, a, up), upstream)
            own = (x, w[cut], b[cut], a, up[cut])
            mine = gradients(lambda *v, c=call: c(*v, group=group), own, upstream)
            expected = (*whole[:2], whole[2][cut], whole[3][cut], whole[4], whole[5][cut])
            close = {"rtol": 1e-4, "atol": 1e-5}
            if dtype == torch.bfloat16:
                close = {"rtol": 2e-2, "atol": 2e-2 * float(whole[1].abs().max())}
            for ours, theirs in zip(mine, expected, strict=True):
                torch.testing.assert_close(ours, theirs, **close)
    skipped = FF.linear_cross_entropy(x, w[cut], t, skip_below=1e-3, process_group=group)
    torch.testing.assert_close(skipped, FF.linear_cross_entropy(x, w, t))
    bad = t.clone()
    bad[1] = 700
    with pytest.raises(IndexError, match="expected classes from 0 to 699"):
        FF.linear_cross_entropy(x, w[cut], bad, process_group=group)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_share_the_vocabulary():
    mp.spawn(sharded, (free_port(),), nprocs=2)


# ---- distillation


def pair(tokens=21, classes=130, dtype=torch.float32):
    s, t = torch.randn(tokens, 8).to(dtype), torch.randn(tokens, 12).to(dtype)
    sw, tw = torch.randn(classes, 8).to(dtype), torch.randn(classes, 12).to(dtype)
    target = torch.randint(classes, (tokens,))
    target[3:5] = IGNORED
    return s, sw, t, tw, target


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("hard", [True, False])
def test_linear_distillation_is_distillation_of_the_logits(divergence, reduction, hard):
    s, sw, t, tw, target = pair()
    target = target if hard else None
    options = {"temperature": 2.5, "alpha": 0.3, "divergence": divergence, "reduction": reduction}
    upstream = torch.randn(21) if reduction == "none" else torch.tensor(-0.8)

    def fused(s, sw):
        return FF.linear_distillation_loss(s, sw, t, tw, target, chunk_bytes=3000, **options)

    def logits(s, sw):
        return FF.distillation_loss(s @ sw.t(), t @ tw.t(), target, backend="torch", **options)

    found = [gradients(call, (s, sw), upstream) for call in (fused, logits)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_linear_distillation_by_the_token_and_twice_backward():
    s, sw, t, tw, target = pair()
    s = s.view(3, 7, 8).requires_grad_()
    t, target = t.view(3, 7, 12), target.view(3, 7)
    loss = FF.linear_distillation_loss(s, sw, t, tw, target, reduction="none")
    assert loss.shape == (3, 7) and not loss[target == IGNORED].any()
    total = FF.linear_distillation_loss(s, sw, t, tw, target)
    torch.testing.assert_close(total, loss.sum() / (target != IGNORED).sum())
    (first,) = torch.autograd.grad(total, s, retain_graph=True)
    (second,) = torch.autograd.grad(total * 2, s)
    torch.testing.assert_close(second, 2 * first)
    assert not first[target == IGNORED].any()
    module = fastllm.nn.LinearDistillationLoss(reduction="none")
    assert torch.equal(module(s, sw, t, tw, target), loss)
    none = torch.full_like(target, IGNORED)
    assert FF.linear_distillation_loss(s, sw, t, tw, none).isnan()
    assert FF.linear_distillation_loss(s, sw, t, tw, none, reduction="sum") == 0


def test_linear_distillation_refuses_what_does_not_fit():
    s, sw, t, tw, target = pair()
    call = FF.linear_distillation_loss
    with pytest.raises(ValueError, match="teacher_weight: expected 130 classes"):
        call(s, sw, t, tw[:-1], target)
    with pytest.raises(ValueError, match="teacher_hidden: expected the tokens"):
        call(s, sw, t[:-1], tw, target)
    with pytest.raises(ValueError, match="student_weight: expected "):
        call(s, tw, t, tw, target)
    with pytest.raises(ValueError, match="divergence: expected one of"):
        call(s, sw, t, tw, divergence="kl")
    target[0] = 130
    with pytest.raises(IndexError, match="found 130 in row 0"):
        call(s, sw, t, tw, target)


def test_linear_distillation_under_autocast_trains_only_the_student():
    s, sw, t, tw, target = pair()
    leaves = [v.requires_grad_() for v in (s, sw, t, tw)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FF.linear_distillation_loss(s, sw, t, tw, target)
    loss.backward()
    assert loss.dtype == torch.float32 and leaves[1].grad.dtype == torch.float32
    assert leaves[2].grad is None and leaves[3].grad is None
    exact = FF.distillation_loss(s @ sw.t(), t @ tw.t(), target)
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=2e-2)


def largest_allocation(step):
    with torch.profiler.profile(profile_memory=True) as log:
        step()
    return max((e.cpu_memory_usage for e in log.events()), default=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_are_held(dtype):
    """Of 512 x 4096 logits, an eighth at most is there at once, and what gradients take."""
    x, w, t = head(512, 32, 4096, dtype)
    logits = 512 * 4096 * x.element_size()
    x.requires_grad_()
    w.requires_grad_()
    ours = largest_allocation(
        lambda: FF.linear_cross_entropy(x, w, t, chunk_bytes=logits // 8).backward()
    )
    assert 0 < ours < logits // 2
    both = largest_allocation(
        lambda: FF.linear_distillation_loss(
            x, w, x.detach(), w.detach(), t, chunk_bytes=logits // 4
        ).backward()
    )
    assert 0 < both < logits // 2


@pytest.mark.parametrize("distil", [False, True])
def test_thirty_two_steps_match_stock(distil):
    """By parts (bfloat16 weights would): losses, parameters and probabilities stay together."""
    ids = torch.randint(97, (32, 8, 12))
    teacher = torch.randn(97, 24), torch.randn(97, 24)
    runs = []
    for ours in (True, False):
        torch.manual_seed(4)
        body = torch.nn.Sequential(torch.nn.Embedding(97, 16), torch.nn.Linear(16, 16))
        out = torch.nn.Linear(16, 97)
        params = [*body.parameters(), *out.parameters()]
        optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
        for batch in ids:
            h, t = body(batch[:, :-1]).tanh(), batch[:, 1:]
            taught = F.embedding(batch[:, :-1], teacher[0])
            if distil and ours:
                loss = FF.linear_distillation_loss(
                    h, out.weight, taught, teacher[1], t, student_bias=out.bias, chunk_bytes=4000
                )
            elif distil:
                loss = FF.distillation_loss(out(h), taught @ teacher[1].t(), t, backend="torch")
            elif ours:  # reduction="none" goes by parts
                each = FF.linear_cross_entropy(
                    h, out.weight, t, out.bias, chunk_bytes=400, reduction="none"
                )
                loss = each.mean()
            else:
                loss = F.cross_entropy(out(h).flatten(0, 1), t.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        top = out(body(ids[0]).tanh()).log_softmax(-1).topk(5).values.detach()
        runs.append((torch.stack(losses), [p.detach() for p in params], top))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-3, atol=1e-3)
