"""Attention's semantics: torch's own where torch has them, the definition where it has not."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastllm.core.op import OPS
from fastllm.core.proof import compare
from fastllm.functional import (
    merge_attention,
    scaled_dot_product_attention,
)
from fastllm.ops.attention import random

DENSE = OPS["attention"]
KERNELS = [n for n in DENSE.backends if n not in ("torch", "reference", "triton", "cuda")]
each_backend = pytest.mark.parametrize("backend", [*KERNELS, "torch", "reference"])


def tensors(*shapes, grad=False, dtype=torch.float32):
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


# ---- torch's semantics

SHAPES = [
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 8)),
    ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
    ((2, 3, 5, 8), (3, 7, 8), (3, 7, 8)),
    ((1, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    ((2, 2, 3, 5, 8), (2, 1, 3, 7, 8), (1, 2, 1, 7, 8)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_shapes_broadcast_as_torch_does(shapes):
    args = tensors(*shapes, grad=True)
    ours = scaled_dot_product_attention(*args)
    stock = F.scaled_dot_product_attention(*args)
    torch.testing.assert_close(ours, stock)
    up = torch.randn_like(stock)
    for a, b in zip(
        torch.autograd.grad(ours, args, up), torch.autograd.grad(stock, args, up), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


MASKS = [(5, 7), (1, 7), (5, 1), (2, 1, 5, 7), (1, 4, 1, 7), (4, 5, 7), (2, 4, 5, 7)]


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_broadcast_as_torch_does(shape, boolean):
    q, k, v = tensors((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    mask = torch.rand(shape) < 0.6 if boolean else torch.randn(shape).requires_grad_()
    ours = scaled_dot_product_attention(q, k, v, mask)
    stock = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, stock)
    if not boolean:
        up = torch.randn_like(stock)
        a, b = (torch.autograd.grad(o, mask, up)[0] for o in (ours, stock))
        assert a.shape == mask.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_are_repeated_heads(groups, causal):
    q, k, v = tensors((2, 4, 5, 8), (2, groups, 5, 8), (2, groups, 5, 8))
    ours = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("scale", [None, 0.5, 0.0, -1.0])
def test_scale(scale):
    q, k, v = tensors((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
    torch.testing.assert_close(
        scaled_dot_product_attention(q, k, v, scale=scale),
        F.scaled_dot_product_attention(q, k, v, scale=scale),
    )


# ---- what torch does not have


def visible(t, s, diagonal, left=-1, right=0):
    i, j = torch.arange(t)[:, None] + diagonal, torch.arange(s)
    inside = torch.ones(t, s, dtype=torch.bool)
    if left >= 0:
        inside &= j >= i - left
    if right >= 0:
        inside &= j <= i + right
    return inside


@each_backend
@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (4, 4)], ids=str)
def test_alignment_and_window_say_what_a_mask_says(sizes, backend):
    t, s = sizes
    q, k, v = tensors((1, 2, t, 8), (1, 2, s, 8), (1, 2, s, 8))
    for align, diagonal in (("top_left", 0), ("bottom_right", s - t)):
        for causal, window in ((True, None), (False, (2, 1)), (True, (2, -1)), (False, (-1, 1))):
            left, right = window or (-1, -1)
            mask = visible(t, s, diagonal, left, 0 if causal else right)
            ours = scaled_dot_product_attention(
                q, k, v, is_causal=causal, window=window, causal_align=align, backend=backend
            )
            stock = F.scaled_dot_product_attention(q, k, v, mask)
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@each_backend
def test_rows_that_see_nothing(backend):
    """Output 0, lse -inf, gradients 0: never NaN."""
    q, k, v = tensors((1, 2, 6, 8), (1, 2, 4, 8), (1, 2, 4, 8), grad=True)
    out, lse = scaled_dot_product_attention(
        q, k, v, is_causal=True, causal_align="bottom_right", return_lse=True, backend=backend
    )
    assert not out[:, :, :2].any() and (lse[:, :, :2] == -math.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    grads = torch.autograd.grad(
        (out, lse), (q, k, v), (torch.randn_like(out), torch.ones_like(lse))
    )
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][:, :, :2].any()
    mask = torch.zeros(6, 4, dtype=torch.bool)
    out = scaled_dot_product_attention(q, k, v, mask, backend=backend)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert not out.any() and not any(g.any() for g in grads)
    sinks = torch.tensor([0.5, -1.0])
    out, lse = scaled_dot_product_attention(
        q, k, v, mask, sinks=sinks, return_lse=True, backend=backend
    )
    assert not out.any()
    torch.testing.assert_close(lse[0], sinks[:, None].expand(2, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "lead, t, s",
    [((1, 1), 150, 300), ((2, 1), 150, 300), ((1, 4), 150, 300), ((2, 4), 40, 1100)],
    ids=str,
)
def test_boolean_masks_with_whole_blocks(lead, t, s, dtype):
    """Blocks that are hidden, whole or cut, of a mask that batch and heads share or not."""
    args = tensors((2, 4, t, 64), (2, 2, s, 64), (2, 2, s, 64), grad=True, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in args]
    mask = visible(t, s, s - t, s - 10).repeat(*lead, 1, 1)
    mask[-1, -1, t // 15 : t * 2 // 3, s // 8 : s // 2 + 150] = False
    mask[-1, -1, 32:64] = False
    up, found = torch.randn(2, 4, t, 64, dtype=dtype), []
    for backend, inputs in (("cpu", args), ("torch", args), ("reference", wide)):
        out = scaled_dot_product_attention(*inputs, mask, enable_gqa=True, backend=backend)
        grads = torch.autograd.grad(out, inputs, up.to(out.dtype))
        found.append([out.detach(), *grads])
    for i, (ours, stock, right) in enumerate(zip(*found, strict=True)):
        proof = compare(str(i), ours, stock, right)
        assert proof.ok, proof.message


@each_backend
def test_fp16_with_large_logits_stays_finite(backend):
    """Scores up to 10^6 overflow float16: sums and scores are float32."""
    q, k, v = tensors((1, 2, 33, 64), (1, 2, 70, 64), (1, 2, 70, 64), dtype=torch.float16)
    q, k, v = ((x * f).requires_grad_() for x, f in ((q, 300), (k, 300), (v, 1)))
    out = scaled_dot_product_attention(q, k, v, scale=1.0, backend=backend)
    exact = scaled_dot_product_attention(*(x.double() for x in (q, k, v)), scale=1.0)
    if backend != "torch":
        torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)
        (grad,) = torch.autograd.grad(out, v, torch.randn_like(out))
        assert grad.isfinite().all()


@each_backend
def test_lse_is_natural_and_has_a_gradient(backend):
    q, k, v = tensors((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), grad=True)
    out, lse = scaled_dot_product_attention(q, k, v, return_lse=True, backend=backend)
    scores = q @ k.mT * 8**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    up = torch.randn_like(lse)
    ours = torch.autograd.grad(lse, (q, k), up, retain_graph=True)
    for a, b in zip(ours, torch.autograd.grad(scores.logsumexp(-1), (q, k), up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert out.shape == (*v.shape[:2], 5, 8)


def test_merged_parts_are_the_whole():
    q, k, v = tensors((2, 2, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8), grad=True)
    parts = [
        scaled_dot_product_attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True)
        for a, b in ((0, 4), (4, 9))
    ]
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole, total = scaled_dot_product_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, total)
    up = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, (q, k, v), up), torch.autograd.grad(whole, (q, k, v), up),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    blind = torch.full_like(lse, -math.inf)
    again, same = merge_attention([whole, whole], [total, blind])
    torch.testing.assert_close(again, whole)
    torch.testing.assert_close(same, total)


# ---- dropout


def test_dropout_is_reproducible_and_has_the_right_share():
    q, k = torch.zeros(2, 4, 64, 16), torch.zeros(2, 4, 256, 16)
    v = torch.ones(2, 4, 256, 16)
    torch.manual_seed(3)
    first = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    other = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    again = scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    assert torch.equal(first, again) and not torch.equal(first, other)
    # 2 * 4 * 64 means of 256 draws
    assert abs(first.mean().item() - 1.0) < 0.01
    assert not scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, dropout_p=0.0), v[:, :, :64])


def test_every_backend_drops_the_same():
    """Forward and backward of a seed, by the definition's own mask."""
    q, k, v = tensors((2, 2, 33, 16), (2, 2, 70, 16), (2, 2, 70, 16), grad=True)
    seed = torch.tensor([-(2**61) + 12345])
    keep = random.keep(seed, torch.arange(4).view(2, 2), 33, 70, 0.4)
    assert abs(keep.double().mean().item() - 0.6) < 0.02
    p = (q @ k.mT * 0.25).softmax(-1) * keep / 0.6
    exact = p @ v
    up = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, (q, k, v), up)
    for name in [*KERNELS, "torch", "reference"]:
        out = DENSE(q, k, v, None, None, None, seed, 0.4, 0.25, -1, -1, 0, 0.0, backend=name)
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5)
        for a, b in zip(torch.autograd.grad(out, (q, k, v), up), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointing_draws_the_same_mask():
    q, k, v = tensors((1, 2, 9, 8), (1, 2, 9, 8), (1, 2, 9, 8), grad=True)

    def block(q, k, v):
        return scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)

    grads = []
    for run in (block, lambda *a: checkpoint(block, *a, use_reentrant=False)):
        torch.manual_seed(7)
        out = run(q, k, v)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- the rest of torch


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_upstream_gradients_of_any_layout(kind):
    q, k, v = tensors((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), grad=True)
    shape = (2, 2, 5, 8)
    up = torch.randn(()).expand(shape) if kind == "expanded" else torch.randn(2, 5, 2, 8)
    up = up if kind == "expanded" else up.transpose(1, 2)
    ours = torch.autograd.grad(scaled_dot_product_attention(q, k, v), (q, k, v), up)
    stock = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), up.contiguous())
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_stock_dtypes(dtype):
    q, k, v = tensors((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), grad=True)
    mask = torch.randn(5, 7)
    with torch.autocast("cpu", dtype=dtype):
        ours = scaled_dot_product_attention(q, k, v, mask)
        stock = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == stock.dtype == dtype
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(ours.sum(), q)
    assert grad.dtype == torch.float32


def test_compiles_whole():
    q, k, v = tensors((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), grad=True)

    def call(q, k, v):
        out, lse = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, window=(3, -1), return_lse=True
        )
        return out.sum() + lse[lse.isfinite()].sum() * 0 + (out * out).sum()

    def plain(q, k, v):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, window=(3, -1))
        return out.sum() + (out * out).sum()

    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(q, k, v), call(q, k, v)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v)), torch.autograd.grad(eager, (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_double_backward_is_right():
    q, k, v = tensors((1, 2, 3, 4), (1, 1, 4, 4), (1, 1, 4, 4), grad=True, dtype=torch.float64)

    def call(q, k, v):
        return scaled_dot_product_attention(
            q, k, v, enable_gqa=True, is_causal=True, backend="reference"
        )

    assert torch.autograd.gradcheck(call, (q, k, v))
    assert torch.autograd.gradgradcheck(call, (q, k, v))


@settings(max_examples=25)
@given(
    t=st.integers(0, 70),
    s=st.integers(0, 140),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    width=st.integers(1, 80),
    causal=st.booleans(),
    align=st.sampled_from(["top_left", "bottom_right"]),
    seed=st.integers(0, 99),
)
def test_any_shape_keeps_the_budget(t, s, groups, width, causal, align, seed):
    torch.manual_seed(seed)
    h, g = groups
    q, k, v = tensors((1, h, t, width), (1, g, s, width), (1, g, s, width), grad=True)
    up = torch.randn(1, h, t, width)
    options = {"is_causal": causal, "causal_align": align, "enable_gqa": True}
    found = {}
    for name, dtype in (
        ("torch", torch.float32),
        (None, torch.float32),
        ("reference", torch.float64),
    ):
        args = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*args, **options, backend=name)
        found[name] = [out, *torch.autograd.grad(out, args, up.to(dtype), allow_unused=True)]
    exact = found.pop("reference")
    for i, wanted in enumerate(exact):
        ours, stock = found[None][i], found["torch"][i]
        if ours is None or stock is None or not wanted.any():
            continue  # no gradient at all, or nothing but rounding
        proof = compare(str(i), ours.detach(), stock.detach(), wanted.detach())
        assert proof.ok, proof.message


# ---- bad input

GOOD = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8))
BAD = {
    "key": [((2, 4, 5, 8), (2, 4, 7, 6), (2, 4, 7, 8)), ((2, 4, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))],
    "value": [((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 6, 8))],
    "query": [((8,), (2, 4, 7, 8), (2, 4, 7, 8))],
}


@pytest.mark.parametrize("name, shapes", [(n, s) for n, each in BAD.items() for s in each])
def test_shapes_that_do_not_fit_are_named(name, shapes):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        scaled_dot_product_attention(*tensors(*shapes))


@pytest.mark.parametrize(
    "name, options",
    [
        ("causal_align", {"causal_align": "left"}),
        ("window", {"window": (-2, 0)}),
        ("window", {"window": 3}),
        ("softcap", {"softcap": -1.0}),
        ("dropout_p", {"dropout_p": 1.5}),
        ("attn_mask", {"attn_mask": torch.zeros(5, 6)}),
        ("attn_mask", {"attn_mask": torch.zeros(5, 7, dtype=torch.int32)}),
        ("alibi_slopes", {"alibi_slopes": torch.zeros(3)}),
        ("sinks", {"sinks": torch.zeros(4, dtype=torch.int32)}),
        ("backend", {"backend": "fast"}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_options_that_do_not_fit_are_named(name, options):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
        scaled_dot_product_attention(*tensors(*GOOD), **options)
