"""Losses: what the registry's tests cannot see: levels, torch's signature, known traps."""

import pytest
import torch
import torch.nn.functional as F

import fastllm
import fastllm.nn
from fastllm import _C
from fastllm import functional as FF
from fastllm.core.op import OPS
from fastllm.core.proof import prove

LEVELS = _C.isa_levels()
ROWS = ("cross_entropy", "cross_entropy_probs", "divergence", "softmax", "log_softmax")
IGNORED = -100


@pytest.fixture(params=LEVELS)
def level(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("name", ROWS)
def test_every_level_keeps_the_error_budget(name, level):
    torch.set_num_threads(2)
    op, proven = OPS[name], 0
    for case in op.cases:
        if "quick" not in case.tags or op.why_not("cpu", case.args()) is not None:
            continue
        proof = prove(op, case, "cpu")
        assert proof.ok, f"{level}: {case.name}: {proof.message}"
        proven += 1
    assert proven > 5 and _C.isa() == level


def both(ours, stock, x, *args, upstream=None, **options):
    """(loss, gradient) of ours and of stock."""
    found = []
    for call in (ours, stock):
        leaf = x.detach().clone().requires_grad_()
        loss = call(leaf * 1.0, *args, **options)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
        found.append((loss.detach(), grad))
    return found


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("soft", [False, True])
def test_torchs_signature(reduction, smoothing, shape, soft):
    x = torch.randn(shape)
    classes = x.movedim(min(1, x.dim() - 1), -1)
    if soft:
        target = torch.randn(shape).softmax(min(1, x.dim() - 1))
    else:
        target = torch.randint(5, classes.shape[:-1])
        if target.dim():
            target.view(-1)[0] = 2
    options = {"weight": torch.rand(5), "reduction": reduction, "label_smoothing": smoothing}
    if not soft:
        options["ignore_index"] = 2
        if target.dim() == 0:
            target.fill_(1)
    upstream = torch.randn(target.shape if not soft else classes.shape[:-1])
    upstream = upstream if reduction == "none" else torch.tensor(0.7)
    ours, stock = both(FF.cross_entropy, F.cross_entropy, x, target, upstream=upstream, **options)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_old_reduction_arguments_and_byte_targets():
    x, t = torch.randn(6, 9), torch.randint(9, (6,))
    with pytest.warns(UserWarning):
        ours = FF.cross_entropy(x, t, None, False, IGNORED, True)
    torch.testing.assert_close(ours, F.cross_entropy(x, t, reduction="sum"))
    torch.testing.assert_close(FF.cross_entropy(x, t.byte()), F.cross_entropy(x, t))


def test_all_ignored_and_weights_that_sum_to_zero():
    x, t = torch.randn(4, 9), torch.full((4,), IGNORED)
    for reduction in ("mean", "sum"):
        ours, stock = both(FF.cross_entropy, F.cross_entropy, x, t, reduction=reduction)
        assert torch.equal(ours[0].isnan(), stock[0].isnan())
        assert not ours[1].nan_to_num(0.0).any()
    assert FF.cross_entropy(x, t).isnan() and FF.cross_entropy(x, t, reduction="sum") == 0
    zero = torch.zeros(9)
    assert FF.cross_entropy(x, torch.arange(4), zero).isnan()
    assert FF.cross_entropy(x, torch.arange(4), zero, reduction="sum") == 0


@pytest.mark.parametrize("bad", [9, -1, 1 << 40])
def test_targets_out_of_range_raise(bad):
    x, t = torch.randn(4, 9, requires_grad=True), torch.tensor([0, 1, bad, 3])
    w = torch.randn(9, 5)
    with pytest.raises(IndexError, match=f"target: expected classes from 0 to 8.*found {bad}"):
        FF.cross_entropy(x, t)
    with pytest.raises(IndexError, match="in row 2"):
        FF.linear_cross_entropy(torch.randn(4, 5), w, t)


def test_a_masked_row_gets_exact_zeros_even_from_nan():
    x = torch.randn(3, 40)
    x[1] = float("nan")
    leaf = x.requires_grad_()
    loss = FF.cross_entropy(leaf, torch.tensor([1, IGNORED, 2]))
    loss.backward()
    assert loss.isfinite() and not leaf.grad[1].any() and leaf.grad[0].any()


def test_the_true_class_as_its_probability_goes_to_one():
    """p - 1 by subtraction loses every digit; the gradient is that of float64 but for rounding."""
    gap = torch.linspace(5, 16, 12)
    x = torch.zeros(12, 50)
    x[:, 7] = gap
    t = torch.full((12,), 7)
    for dtype in (torch.float32, torch.bfloat16):
        low = x.to(dtype)
        a = low.clone().requires_grad_()
        FF.cross_entropy(a * 1.0, t, reduction="sum").backward()
        b = low.double().requires_grad_()
        F.cross_entropy(b, t, reduction="sum").backward()
        own, exact = a.grad[:, 7].double(), b.grad[:, 7]
        assert ((own - exact).abs() <= 0.01 * exact.abs() + 1e-7).all()


def test_gradients_again_after_the_saved_one_was_taken():
    """Forward makes the gradient; a second backward pass has to compute it."""
    x, t = torch.randn(6, 300, requires_grad=True), torch.randint(300, (6,))
    loss = FF.cross_entropy(x * 1.0, t)
    for scale in (1.0, 0.25, 3.0):
        (ours,) = torch.autograd.grad(loss * scale, x, retain_graph=True)
        (stock,) = torch.autograd.grad(F.cross_entropy(x, t) * scale, x)
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-8)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert first.requires_grad


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"softcap": 4.0}]
)
def test_the_gradient_made_by_forward_is_that_of_backward(options):
    for classes, dtype in ((33, torch.float32), (5000, torch.bfloat16), (140_000, torch.float32)):
        x = torch.randn(3, classes).to(dtype).requires_grad_()
        t = torch.tensor([1, IGNORED, classes - 1])
        one, two = (FF.cross_entropy(x * 1.0, t, **options) for _ in range(2))
        (fast,) = torch.autograd.grad(one, x)
        torch.autograd.grad(two, x, retain_graph=True)
        (slow,) = torch.autograd.grad(two, x)
        torch.testing.assert_close(
            fast, slow, rtol=2e-5 if dtype.itemsize == 4 else 1e-2, atol=1e-7
        )


def test_inplace_backward():
    x, t = torch.randn(6, 40), torch.randint(40, (6,))
    for kind in ("mean", "none"):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1.0
        before, version = logits.data_ptr(), logits._version
        logits.retain_grad()
        loss = FF.cross_entropy(logits, t, reduction=kind, inplace_backward=True)
        loss.sum().backward()
        assert logits._version > version and logits.data_ptr() == before
        stock = x.clone().requires_grad_()
        F.cross_entropy(stock, t, reduction=kind).sum().backward()
        torch.testing.assert_close(leaf.grad, stock.grad)
        assert torch.equal(logits.detach(), leaf.grad)
    with pytest.raises(ValueError, match="inplace_backward: expected an input that is not a leaf"):
        FF.cross_entropy(x.requires_grad_(), t, inplace_backward=True)


def test_without_inplace_the_logits_stay_as_they_are():
    x, t = torch.randn(6, 40, requires_grad=True), torch.randint(40, (6,))
    logits = x * 1.0
    kept = logits.detach().clone()
    FF.cross_entropy(logits, t).backward()
    assert torch.equal(logits, kept)


def head(tokens=37, features=16, classes=211, dtype=torch.float32):
    x = torch.randn(tokens, features, dtype=dtype)
    w = torch.randn(classes, features, dtype=dtype) / 4
    return x, w, torch.randint(classes, (tokens,))


@pytest.mark.parametrize("chunk", [1, 5 * 211 * 4, 1 << 30])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy_by_chunks(chunk, reduction):
    x, w, t = head()
    t[3], t[:2] = IGNORED, IGNORED
    b = torch.randn(211)
    upstream = torch.randn(37) if reduction == "none" else torch.tensor(-1.3)
    found = []
    for ours in (True, False):
        args = [a.clone().requires_grad_() for a in (x, w, b)]
        if ours:
            loss = FF.linear_cross_entropy(
                args[0], args[1], t, args[2], reduction=reduction, chunk_bytes=chunk
            )
        else:
            loss = F.cross_entropy(F.linear(*args), t, reduction=reduction)
        found.append((loss.detach(), *torch.autograd.grad(loss, args, upstream)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_linear_cross_entropy_never_holds_all_logits():
    x, w, t = head(512, 32, 4096)
    logits = 512 * 4096 * 4
    with torch.profiler.profile(profile_memory=True) as log:
        FF.linear_cross_entropy(x.requires_grad_(), w, t, chunk_bytes=logits // 16).backward()
    largest = max((e.cpu_memory_usage for e in log.events()), default=0)
    assert 0 < largest < logits // 2


def test_linear_cross_entropy_twice_backward_and_frozen_weight():
    x, w, t = head()
    x.requires_grad_()
    loss = FF.linear_cross_entropy(x, w, t)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss * 2, x)
    torch.testing.assert_close(second, 2 * first)
    assert w.grad is None


def test_tied_embedding_gets_both_gradients():
    table, ids = torch.randn(211, 16), torch.randint(211, (37,))
    grads = []
    for call in (
        lambda h, w: FF.linear_cross_entropy(h, w, ids),
        lambda h, w: F.cross_entropy(h @ w.t(), ids),
    ):
        w = table.clone().requires_grad_()
        call(F.embedding(ids, w).tanh(), w).backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_linear_cross_entropy_under_autocast():
    x, w, t = head()
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = FF.linear_cross_entropy(x, w, t)
        stock = F.cross_entropy(F.linear(x, w), t)
    assert loss.dtype == stock.dtype == torch.float32
    torch.testing.assert_close(loss, stock, rtol=2e-2, atol=2e-2)
    loss.backward()
    assert w.grad.dtype == torch.float32 and w.grad.any()


def test_distillation_loss():
    s, teacher, t = torch.randn(4, 6, 50), torch.randn(4, 6, 50), torch.randint(50, (4, 6))
    t[0, :3] = IGNORED
    for temperature, alpha in ((1.0, 0.5), (3.0, 0.9)):
        a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
        ours = FF.distillation_loss(a, teacher, t, temperature=temperature, alpha=alpha)
        kept = t != IGNORED
        log_p, log_q = (F.log_softmax(v / temperature, -1)[kept] for v in (b, teacher))
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        stock = alpha * temperature**2 * kl + (1 - alpha) * F.cross_entropy(b[kept], t[kept])
        torch.testing.assert_close(ours, stock)
        ours.backward()
        stock.backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    same = FF.distillation_loss(teacher, teacher, divergence="jsd")
    assert same.abs() < 1e-6
    with pytest.raises(ValueError, match="divergence: expected one of"):
        FF.distillation_loss(s, teacher, divergence="kl")


def test_hidden_state_losses():
    a, b = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, 8)
    mask = torch.rand(3, 5) < 0.5
    torch.testing.assert_close(FF.hidden_state_loss(a, b), F.mse_loss(a, b))
    cosine = F.cosine_embedding_loss(a[mask], b[mask], torch.ones(int(mask.sum())))
    torch.testing.assert_close(FF.hidden_state_loss(a, b, mask, kind="cosine"), cosine)


@pytest.mark.parametrize("fused", [False, True])
def test_thirty_two_steps_match_stock(fused):
    """A small model trained twice: losses, parameters and log-probabilities stay together."""
    torch.manual_seed(3)
    ids = torch.randint(97, (32, 8, 12))
    runs = []
    for ours in (True, False):
        torch.manual_seed(4)
        body = torch.nn.Sequential(torch.nn.Embedding(97, 24), torch.nn.Linear(24, 24))
        out = torch.nn.Linear(24, 97)
        params = [*body.parameters(), *out.parameters()]
        optimizer, losses = torch.optim.AdamW(params, lr=1e-2), []
        for batch in ids:
            h, t = body(batch[:, :-1]).tanh(), batch[:, 1:]
            if ours and fused:
                loss = FF.linear_cross_entropy(h, out.weight, t, out.bias, chunk_bytes=4000)
            else:
                call = FF.cross_entropy if ours else F.cross_entropy
                loss = call(out(h).flatten(0, 1), t.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        top = out(body(ids[0]).tanh()).log_softmax(-1).topk(5).values.detach()
        runs.append((torch.stack(losses), [p.detach() for p in params], top))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(runs[0][2], runs[1][2], rtol=1e-3, atol=1e-3)


def test_softmax_dtype_and_default_dim():
    x = torch.randn(4, 6).bfloat16()
    torch.testing.assert_close(
        FF.softmax(x, -1, dtype=torch.float32), F.softmax(x, -1, dtype=torch.float32)
    )
    torch.testing.assert_close(FF.log_softmax(x.float(), 0), F.log_softmax(x.float(), 0))
    with pytest.raises(IndexError, match="dim: expected -2 to 1, found 2"):
        FF.softmax(x, 2)


def test_forced_backends_agree():
    x, t = torch.randn(6, 40), torch.randint(40, (6,))
    for backend in ("torch", "reference", "cpu"):
        with fastllm.backend(backend):
            torch.testing.assert_close(FF.cross_entropy(x, t), F.cross_entropy(x, t))


def test_modules():
    x, t, w = torch.randn(6, 40), torch.randint(40, (6,)), torch.rand(40)
    stock = torch.nn.CrossEntropyLoss(w, label_smoothing=0.1)
    ours = fastllm.nn.CrossEntropyLoss(w, label_smoothing=0.1)
    torch.testing.assert_close(ours(x, t), stock(x, t))
    assert repr(ours) == repr(stock) and ours.state_dict().keys() == stock.state_dict().keys()
    h, table, ids = head()
    linear = fastllm.nn.LinearCrossEntropyLoss(reduction="sum", chunk_bytes=3000)
    torch.testing.assert_close(
        linear(h, table, ids), F.cross_entropy(h @ table.t(), ids, reduction="sum")
    )
    distil = fastllm.nn.DistillationLoss(temperature=2.0, divergence="reverse_kl")
    expected = FF.distillation_loss(x, x.flip(0), t, temperature=2.0, divergence="reverse_kl")
    assert torch.equal(distil(x, x.flip(0), t), expected)


def test_triton_kernels_compile_for_gpus_that_are_not_here():
    pytest.importorskip("triton")
    from fastllm.kernels import loss, softmax
    from fastllm.kernels.aot import compile, meta, record
    from triton.backends.compiler import GPUTarget

    x, rows = meta(64, 32000, dtype=torch.bfloat16), meta(64)
    t, lse, w = meta(64, dtype=torch.int64), meta(64, dtype=torch.float64), meta(32000)
    rest = (IGNORED, 0.1, 1e-4, 30.0, 0.5)
    stats = meta(64, 3, dtype=torch.float64)
    launches = [
        *record(loss.cross_entropy_fwd, x, t, None, IGNORED, 0.0, 0.0, 0.0, 1.0),
        *record(loss.cross_entropy_fwd, x, x, w, *rest),
        *record(
            loss.cross_entropy_bwd, x, t, None, lse, rows, x, None, IGNORED, 0.0, 0.0, 0.0, 1.0
        ),
        *record(loss.cross_entropy_bwd, x, x, None, lse, rows, x, x, IGNORED, 0.0, 0.0, 30.0, 1.0),
        *[each for k in ("jsd", "tvd") for each in record(loss.distill_fwd, x, x, k, 2.0)],
        *record(loss.distill_bwd, x, x, stats, rows, "jsd", 2.0),
        *record(softmax.softmax_fwd, x, False),
        *record(softmax.softmax_bwd, x, x, True),
    ]
    names = {launch.kernel.__name__ for launch in launches}
    assert len(names) == 6
    for launch in launches:
        binary = compile(launch, GPUTarget("cuda", 90, 32))
        assert binary.metadata.shared < 64 * 1024 and "v4.b32" in binary.asm["ptx"], str(launch)
