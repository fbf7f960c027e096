"""fastllm.nn.MultiheadAttention against torch's own, and Attention against its formula."""

import copy

import pytest
import torch
from torch import nn

import fastllm
from fastllm.nn import attention as module

E, H, B, T, S = 32, 4, 3, 17, 23


@pytest.fixture
def calls(monkeypatch):
    """How often fastllm's attention ran."""
    real, seen = fastllm.functional.scaled_dot_product_attention, []

    def counted(*args, **kwargs):
        seen.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(fastllm.functional, "scaled_dot_product_attention", counted)
    return seen


def pair(**options):
    """(ours, torch's) with equal weights."""
    stock = nn.MultiheadAttention(E, H, **options)
    ours = fastllm.nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(stock.state_dict())
    assert list(ours.state_dict()) == list(stock.state_dict()) and repr(ours) == repr(stock)
    return ours, stock


def padding():
    return torch.arange(S) >= torch.tensor([S, 9, 1])[:, None]


def masks(name):
    upper = torch.ones(T, S, dtype=torch.bool).triu(2)
    float_padding = torch.zeros(B, S).masked_fill(padding(), -torch.inf)
    return {
        "none": {},
        "bool": {"attn_mask": upper},
        "additive": {"attn_mask": torch.randn(T, S)},
        "heads": {"attn_mask": torch.randn(B * H, T, S) > 1.5},
        "padding": {"key_padding_mask": padding()},
        "additive padding": {"key_padding_mask": float_padding},
        "biased padding": {"key_padding_mask": torch.randn(B, S)},
        "both": {"attn_mask": upper, "key_padding_mask": padding()},
        "mixed": {"attn_mask": torch.randn(T, S), "key_padding_mask": padding()},
        "causal": {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(1), "is_causal": True},
        "causal padding": {
            "attn_mask": torch.ones(T, S, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": padding(),
        },
    }[name]


def results(mha, inputs, options, upstream):
    """Output and gradients of inputs and parameters."""
    inputs = [x.to(next(mha.parameters()).dtype).requires_grad_() for x in inputs]
    options = {
        k: v.to(inputs[0].dtype) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in options.items()
    }
    out, weights = mha(*inputs, need_weights=False, **options)
    assert weights is None
    parameters = list(mha.parameters())
    return [out, *torch.autograd.grad(out, [*inputs, *parameters], upstream.to(out.dtype))]


@pytest.mark.parametrize(
    ("mask", "first", "dtype", "options"),
    [
        ("none", True, torch.float32, {}),
        ("bool", False, torch.float32, {"bias": False}),
        ("additive", True, torch.bfloat16, {}),
        ("heads", False, torch.float32, {"kdim": 24, "vdim": 40}),
        ("padding", True, torch.float32, {}),
        ("padding", False, torch.bfloat16, {"bias": False}),
        ("additive padding", True, torch.float32, {"kdim": 24}),
        ("biased padding", False, torch.float32, {}),
        ("both", True, torch.bfloat16, {}),
        ("mixed", False, torch.float32, {}),
        ("causal", True, torch.float32, {}),
        ("causal padding", True, torch.float32, {}),
    ],
)
def test_as_torch(mask, first, dtype, options, calls):
    ours, stock = pair(batch_first=first, **options)
    sizes = (E, options.get("kdim", E), options.get("vdim", E))
    inputs = [torch.randn(B, n, w) for n, w in zip((T, S, S), sizes, strict=True)]
    upstream = torch.randn(B, T, E)
    if not first:
        inputs, upstream = [x.transpose(0, 1) for x in inputs], upstream.transpose(0, 1)
    given = masks(mask)
    right = results(copy.deepcopy(stock).double(), inputs, given, upstream)
    theirs = results(stock.to(dtype), inputs, given, upstream)
    assert not calls
    mine = results(ours.to(dtype), inputs, given, upstream)
    assert len(calls) == 1
    for a, b, r in zip(mine, theirs, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        error, budget = (a - r).abs().max(), (b - r).abs().max()
        scale = r.abs().max() * torch.finfo(dtype).eps
        assert error <= 2 * budget + scale, (error, budget)


@pytest.mark.parametrize("first", [True, False])
def test_self_attention_in_one_product(first, calls):
    ours, stock = pair(batch_first=first)
    x = torch.randn(B, T, E)
    torch.testing.assert_close(
        ours(x, x, x, need_weights=False)[0], stock(x, x, x, need_weights=False)[0]
    )
    with torch.no_grad():
        mine = ours.eval()(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(mine, stock.eval()(x, x, x, need_weights=False)[0])
    assert len(calls) == 2


def test_without_a_batch(calls):
    ours, stock = pair()
    q, k = torch.randn(T, E), torch.randn(S, E)
    hidden = torch.arange(S) > 5
    mine = ours(q, k, k, hidden, need_weights=False)[0]
    torch.testing.assert_close(mine, stock(q, k, k, hidden, need_weights=False)[0])
    assert mine.shape == (T, E) and len(calls) == 1


def test_what_is_torchs_stays_torchs(calls):
    x = torch.randn(B, T, E)
    ours, stock = pair()
    for options in ({}, {"average_attn_weights": False}):
        for a, b in zip(ours(x, x, x, **options), stock(x, x, x, **options), strict=True):
            assert torch.equal(a, b)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        ours, stock = pair(**options)
        pairs = (m(x, x, x, need_weights=False)[0] for m in (ours, stock))
        assert torch.equal(*pairs)
    assert not calls
    with pytest.raises(RuntimeError, match="is_causal"):
        ours(x, x, x, need_weights=False, is_causal=True)


def test_small_inputs_are_torchs(by_size, calls):
    ours, stock = pair()
    x = torch.randn(B, T, E)
    pairs = (m(x, x, x, need_weights=False)[0] for m in (ours, stock))
    assert torch.equal(*pairs) and not calls


def test_a_row_without_keys_gives_the_bias():
    ours, _ = pair(batch_first=True)
    x = torch.randn(2, 5, E)
    hidden = torch.tensor([[False] * 5, [True] * 5])
    out = ours(x, x, x, hidden, need_weights=False)[0]
    assert torch.equal(out[1], ours.out_proj.bias.expand(5, E)) and out.isfinite().all()


def test_padding_changes_nothing_at_real_tokens():
    ours, _ = pair(batch_first=True)
    x = torch.randn(1, 9, E)
    longer = torch.cat((x, torch.full((1, 8, E), torch.nan)), 1).nan_to_num(1e4)
    hidden = torch.arange(17)[None] >= 9
    out = ours(longer, longer, longer, hidden, need_weights=False)[0][:, :9]
    torch.testing.assert_close(out, ours(x, x, x, need_weights=False)[0])


def test_dropout_in_training_only():
    ours, _ = pair(dropout=0.5)
    x = torch.randn(T, B, E)

    def run(seed):
        torch.manual_seed(seed)
        return ours(x, x, x, need_weights=False)[0]

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    ours.eval()
    assert torch.equal(run(1), run(2))


def test_compiled_and_autocast():
    ours, stock = pair(batch_first=True)
    x, hidden = torch.randn(B, S, E), padding()

    def step(m):
        return m(x, x, x, hidden, need_weights=False)[0]

    compiled = torch.compile(lambda: step(ours), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(), step(stock))
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = step(ours), step(stock)
    assert mine.dtype == theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.02)


def test_visible_keys():
    hidden = padding()[:, None, None]
    for low in (-torch.inf, torch.finfo(torch.float32).min):
        additive = torch.zeros(hidden.shape).masked_fill(hidden, low)
        assert torch.equal(module.visible_keys(additive), ~hidden)
        additive[0, 0, 0, 1] = 0.5
        assert module.visible_keys(additive) is None
        additive[0] = low
        assert module.visible_keys(additive) is None, "no key at all"


# ---- Attention


def formula(m, x, cos, sin):
    """The module as plain torch."""
    q, k, v = (
        p(x).unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj)
    )
    if m.q_norm is not None:
        q, k = m.q_norm(q), m.k_norm(k)

    def turn(y):
        a, b = y.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    q, k = turn(q), turn(k)
    k, v = (y.repeat_interleave(m.num_heads // m.num_kv_heads, 1) for y in (k, v))
    scores = q @ k.mT * (m.scale or m.head_dim**-0.5)
    scores = m.softcap * torch.tanh(scores / m.softcap) if m.softcap else scores
    t = x.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool).tril()
    if m.window:
        seen &= torch.ones(t, t, dtype=torch.bool).triu(-m.window[0])
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return m.o_proj((p @ v).transpose(1, 2).flatten(-2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "qk_norm": True},
        {"num_kv_heads": 1, "window": (5, 0), "softcap": 3.0, "bias": True, "scale": 0.2},
    ],
)
def test_attention(options):
    m = fastllm.nn.Attention(E, H, **options)
    angles = torch.randn(T, m.head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    both = cos.repeat(1, 2), sin.repeat(1, 2)
    x = torch.randn(B, T, E, requires_grad=True)
    upstream = torch.randn(B, T, E)
    for a, b in zip(
        *(
            (y, *torch.autograd.grad(y, [x, *m.parameters()], upstream))
            for y in (m(x, *both), formula(m, x, cos, sin))
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_attention_refuses():
    with pytest.raises(ValueError, match="num_kv_heads: expected a divisor of 4, found 3"):
        fastllm.nn.Attention(E, H, 3)
    with pytest.raises(ValueError, match="num_heads: expected a divisor of 32, found 5"):
        fastllm.nn.Attention(E, 5)
