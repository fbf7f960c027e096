"""Attention of packed sequences and of caches: what each sequence alone gives."""

import pytest
import torch

from fastllm.core.op import OPS
from fastllm.functional import (
    attention_varlen,
    attention_with_kv_cache,
    scaled_dot_product_attention,
)

PACKED, CACHED = OPS["attention_varlen"], OPS["attention_cache"]


def tensors(*shapes, grad=False):
    return [torch.randn(s).requires_grad_(grad) for s in shapes]


def runnable(op):
    return pytest.mark.parametrize(
        "backend", [n for n in op.backends if n not in ("triton", "cuda")]
    )


@runnable(PACKED)
def test_packed_sequences_are_the_sequences(backend):
    lengths, keys = (5, 0, 17, 1), (5, 3, 20, 7)
    q, k, v = tensors((sum(lengths), 4, 16), (sum(keys), 2, 16), (sum(keys), 2, 16), grad=True)
    ends = [
        torch.tensor([0, *torch.tensor(x).cumsum(0)], dtype=torch.int32) for x in (lengths, keys)
    ]
    out, lse = attention_varlen(
        q, k, v, *ends, max(lengths), max(keys), is_causal=True, causal_align="bottom_right",
        return_lse=True, backend=backend,
    )  # fmt: skip
    parts = [
        scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (a, b, c)), is_causal=True, enable_gqa=True,
            causal_align="bottom_right", return_lse=True,
        )
        for a, b, c in zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(out, torch.cat([o[0].transpose(0, 1) for o, _ in parts]))
    torch.testing.assert_close(lse, torch.cat([x[0].t() for _, x in parts]))
    up = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), up)
    whole = torch.cat([o[0].transpose(0, 1) for o, _ in parts])
    for a, b in zip(ours, torch.autograd.grad(whole, (q, k, v), up), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@runnable(CACHED)
@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_gives_what_the_whole_sequence_gives(paged, backend):
    b, h, g, d, page, total = 3, 4, 2, 16, 4, (13, 7, 9)
    room = 16
    k, v = tensors((b, g, room, d), (b, g, room, d))
    q = torch.randn(b, h, 2, d)
    table = torch.randperm(b * room // page).view(b, -1).int() if paged else None
    lead = (b * room // page, g, page) if paged else (b, g, room)
    k_cache, v_cache = torch.zeros(*lead, d), torch.zeros(*lead, d)
    used = torch.zeros(b, dtype=torch.int32)
    for new in (5, 2):  # a prefill, then steps of two
        take = torch.stack(
            [
                torch.arange(n - 7 + int(u), n - 7 + int(u) + new)
                for n, u in zip(total, used, strict=True)
            ]
        )
        rows = torch.arange(b)[:, None]
        attention_with_kv_cache(
            torch.randn(b, h, new, d), k_cache, v_cache, used,
            k=k[rows, :, take].transpose(1, 2), v=v[rows, :, take].transpose(1, 2),
            block_table=table, backend=backend,
        )  # fmt: skip
        used = used + new
    out, lse = attention_with_kv_cache(
        q, k_cache, v_cache, used, block_table=table, return_lse=True, backend=backend
    )
    for i, n in enumerate(total):
        exact, wanted = scaled_dot_product_attention(
            q[i : i + 1], k[i : i + 1, :, n - 7 : n], v[i : i + 1, :, n - 7 : n], is_causal=True,
            causal_align="bottom_right", enable_gqa=True, return_lse=True,
        )  # fmt: skip
        torch.testing.assert_close(out[i : i + 1], exact)
        torch.testing.assert_close(lse[i : i + 1], wanted)


def test_a_cache_has_no_gradient():
    q = torch.randn(1, 2, 1, 8, requires_grad=True)
    cache, used = torch.randn(1, 2, 4, 8), torch.tensor([3], dtype=torch.int32)
    out = attention_with_kv_cache(q, cache, cache, used, backend="reference")
    with pytest.raises(RuntimeError, match="no gradient"):
        out.sum().backward()


# ---- bad input


@pytest.mark.parametrize("ends", [(0, 3, 2, 9), (0, 3, 12), (1, 9), (0, 4)], ids=str)
def test_lengths_that_do_not_fit_are_named(ends):
    q, k, v = tensors((9, 2, 8), (9, 2, 8), (9, 2, 8))
    bad = torch.tensor(ends, dtype=torch.int32)
    good = torch.linspace(0, 9, len(ends)).int()
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: expected"):
        attention_varlen(q, k, v, bad, good, 9, 9)
    with pytest.raises(ValueError, match=r"^cu_seqlens_k: expected"):
        attention_varlen(q, k, v, good, bad, 9, 9)
    with pytest.raises(ValueError, match=r"^max_seqlen_q: expected"):
        attention_varlen(q, k, v, good, good, 1, 9)


def test_a_cache_without_room_is_left_alone():
    cache = torch.zeros(2, 2, 4, 8)
    new, used = torch.ones(2, 2, 2, 8), torch.tensor([1, 3], dtype=torch.int32)
    q = torch.randn(2, 2, 2, 8)
    with pytest.raises(ValueError, match=r"^cache_seqlens: expected"):
        attention_with_kv_cache(q, cache, cache, used, k=new, v=new)
    with pytest.raises(ValueError, match=r"^v: expected"):
        attention_with_kv_cache(q, cache, cache, used - 1, k=new, v=new[..., :4])
    with pytest.raises(TypeError, match=r"^v: expected"):
        attention_with_kv_cache(q, cache, cache, used - 1, k=new)
    pages = torch.tensor([[0, 9], [1, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^block_table\[0\]: expected"):
        attention_with_kv_cache(q, cache, cache, used + 3, k=new, v=new, block_table=pages)
    assert not cache.any()
