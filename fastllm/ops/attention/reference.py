"""The attention ops in plain torch: any float dtype, differentiable, computed in float64.

Backward computes everything again from the inputs, so that it can itself be differentiated.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.ops.attention import random
from fastllm.ops.attention.spec import Packed, Terms, fake, saved_parts, statistics


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) as spec.py defines them."""
    return attend(query, key, value, *rest)


def attention_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same, with lse for the caller."""
    return attend(query, key, value, *rest)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, batch: int = 0
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(scores)) v; `batch` is the number of the first of the batch."""
    o = Terms(*rest)
    p, lse = softmax(_scores(query, key, o)[0], o.sinks)
    if o.dropout_p:
        p = p * dropout(o.seed, p, batch, o.dropout_p)
    return _product(p, wide(value)).to(query.dtype), lse.to(statistics(query.dtype))


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64."""
    return tensor.to(torch.float64)


def _product(p: Tensor, value: Tensor) -> Tensor:
    """[B, H, T, S] times [B, G, S, D], G a divisor of H"""
    return (_grouped(p, value.shape[1]) @ value.unsqueeze(2)).flatten(1, 2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, H, ...] -> [B, G, H // G, ...]"""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _scores(query: Tensor, key: Tensor, o: Terms) -> tuple[Tensor, Tensor | None]:
    """[B, H, T, S] logits, -inf where nothing is seen, and the derivative of softcap."""
    q, k = wide(query), wide(key)
    scores, slope = _product(q, k.mT) * o.scale, None
    if o.softcap:
        squashed = torch.tanh(scores / o.softcap)
        scores, slope = o.softcap * squashed, 1 - squashed * squashed
    distance = offsets(query.shape[2], key.shape[2], o.diagonal, query.device)
    if o.alibi_slopes is not None:
        scores = scores - wide(o.alibi_slopes)[..., None, None] * distance.abs()
    if o.attn_mask is not None:
        if o.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~o.attn_mask, -torch.inf)
        else:
            scores = scores + o.attn_mask.to(scores.dtype)
    if o.left >= 0 or o.right >= 0:
        scores = scores.masked_fill(~inside(distance, o.left, o.right), -torch.inf)
    return scores, slope


def offsets(rows: int, columns: int, diagonal: int, device: torch.device) -> Tensor:
    """j - (i + diagonal) of every query i and key j."""
    i = torch.arange(rows, device=device)
    return torch.arange(columns, device=device) - (i[:, None] + diagonal)


def inside(distance: Tensor, left: int, right: int) -> Tensor:
    """Which offsets the window lets see each other."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen = seen & (distance >= -left)
    if right >= 0:
        seen = seen & (distance <= right)
    return seen


def softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(probabilities, lse); rows that see nothing: 0, and -inf or the sink."""
    if sinks is not None:
        sink = wide(sinks).to(scores.dtype)[:, None, None]
        logits = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    else:
        logits = scores
    blind = (logits == -torch.inf).all(-1)
    # logsumexp of -inf alone has no gradient but NaN
    filled = logits.masked_fill(blind[..., None], 0.0)
    p = filled.softmax(-1).masked_fill(blind[..., None], 0.0)[..., : scores.shape[-1]]
    return p, filled.logsumexp(-1).masked_fill(blind, -torch.inf)


def dropout(seed: Tensor | None, p: Tensor, batch: int, dropout_p: float) -> Tensor:
    assert seed is not None
    b, h, t, s = p.shape
    heads = torch.arange(b * h, device=p.device).view(b, h) + batch * h
    return random.keep(seed, heads, t, s, dropout_p) * random.factor(dropout_p)


# ---- backward


def attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, attn_mask, sinks."""
    return attention_lse_backward(grad_out, None, query, key, value, *rest)


def attention_lse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
    batch: int = 0,
) -> tuple[Tensor | None, ...]:
    """dS = P (dP - delta), delta = rowsum(dO O) - dlse; `out` and `lse` are computed again."""
    given, _, _, needs = saved_parts(4, rest)
    o = Terms(*given)
    scores, slope = _scores(query, key, o)
    p, total = softmax(scores, o.sinks)
    dropped = p * dropout(o.seed, p, batch, o.dropout_p) if o.dropout_p else p
    dy, v, groups = wide(grad_out), wide(value), key.shape[1]
    dv = (_grouped(dropped, groups).mT @ _grouped(dy, groups)).sum(2)
    dp = _product(dy, v.mT)
    if o.dropout_p:
        dp = dp * dropout(o.seed, p, batch, o.dropout_p)
    delta = (p * dp).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype).masked_fill(total == -torch.inf, 0.0)
    ds = p * (dp - delta[..., None])
    dmask = dsinks = None
    if o.attn_mask is not None and needs[3]:
        dmask = ds.sum_to_size(o.attn_mask.shape).to(o.attn_mask.dtype)
    if o.sinks is not None and needs[4]:
        wanted = wide(o.sinks).to(total.dtype)[:, None]
        # a sink of -inf is no sink, and its row may see nothing
        share = (wanted - total.masked_fill(total == -torch.inf, 0.0)).exp()
        dsinks = -(share * delta).sum((0, 2)).to(o.sinks.dtype)
    dscores = ds * o.scale if slope is None else ds * slope * o.scale
    dq = _product(dscores, wide(key)) if needs[0] else None
    dk = (_grouped(dscores, groups).mT @ _grouped(wide(query), groups)).sum(2)
    return (
        None if dq is None else dq.to(query.dtype),
        dk.to(key.dtype) if needs[1] else None,
        dv.to(value.dtype) if needs[2] else None,
        dmask,
        dsinks,
    )


# ---- packed sequences


def attention_varlen(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse) of packed sequences, one after the other."""
    parts = []
    for b, rows, columns, terms in sequences(Packed(*rest)):
        q, k, v = (batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        out, lse = attend(q, k, v, *terms(q, k), batch=b)
        parts.append((packed(out), lse[0].t()))
    if not parts:
        return fake(query, key, value)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


attention_varlen_lse = attention_varlen


def sequences(o: Packed) -> Iterator[tuple[int, slice, slice, Callable[..., Terms]]]:
    """Each sequence's number, query and key rows, and its dense terms from its q and k."""
    ends = zip(o.cu_seqlens_q.tolist(), o.cu_seqlens_k.tolist(), strict=True)
    start = next(ends)
    for b, end in enumerate(ends):
        slopes = o.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]

        def terms(q: Tensor, k: Tensor, slopes: Tensor | None = slopes) -> Terms:
            diagonal = k.shape[2] - q.shape[2] if o.bottom_right else 0
            return Terms(
                None, slopes, o.sinks, o.seed, o.dropout_p, o.scale, o.left, o.right, diagonal,
                o.softcap,
            )  # fmt: skip

        yield b, slice(start[0], end[0]), slice(start[1], end[1]), terms
        start = end


def batch_of_one(x: Tensor) -> Tensor:
    """[tokens, H, D] -> [1, H, tokens, D]"""
    return x.transpose(0, 1).unsqueeze(0)


def packed(x: Tensor) -> Tensor:
    """[1, H, tokens, D] -> [tokens, H, D]"""
    return x[0].transpose(0, 1)


def attention_varlen_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value, sinks."""
    return attention_varlen_lse_backward(grad_out, None, query, key, value, *rest)


def attention_varlen_lse_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Sequence by sequence."""
    given, out, lse, needs = saved_parts(5, rest)
    o = Packed(*given)
    dense = (*needs[:3], False, needs[3])
    dq: list[Any] = []
    dk: list[Any] = []
    dv: list[Any] = []
    dsinks: list[Any] = []
    for b, rows, columns, terms in sequences(o):
        q, k, v = (batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        made = terms(q, k)
        grads = attention_lse_backward(
            batch_of_one(grad_out[rows]),
            None if grad_lse is None else grad_lse[rows].t().unsqueeze(0),
            q, k, v, *made[:4], out, lse, *made[4:], dense, batch=b,
        )  # fmt: skip
        for into, grad in zip((dq, dk, dv), grads, strict=False):
            into.append(None if grad is None else packed(grad))
        dsinks.append(grads[4])
    joined = [
        None if not needed else torch.cat(parts) if parts else torch.zeros_like(like)
        for parts, needed, like in zip((dq, dk, dv), needs, (query, key, value), strict=False)
    ]
    if not needs[3] or o.sinks is None:
        return (*joined, None)
    total = torch.stack([wide(d) for d in dsinks]).sum(0) if dsinks else torch.zeros_like(o.sinks)
    return (*joined, total.to(o.sinks.dtype))
