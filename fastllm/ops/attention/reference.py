"""The attention ops in plain torch: any float dtype, differentiable, computed in float64.

Backward computes everything again from the inputs, so that it can itself be differentiated.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.attention import random
from fastllm.ops.attention.spec import fake, statistics


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) as spec.py defines them."""
    return attend(query, key, value, *rest)


def attention_lse(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The same, with lse for the caller."""
    return attend(query, key, value, *rest)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(scores)) v; `batch` is the number of the first of the batch."""
    scores, _ = _scores(
        query, key, attn_mask, alibi_slopes, scale, window_left, window_right, diagonal, softcap
    )
    p, lse = softmax(scores, sinks)
    if dropout_p:
        p = p * dropout(seed, p, batch, dropout_p)
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


def _scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """[B, H, T, S] logits, -inf where nothing is seen, and the derivative of softcap."""
    q, k = wide(query), wide(key)
    scores, slope = _product(q, k.mT) * scale, None
    if softcap:
        squashed = torch.tanh(scores / softcap)
        scores, slope = softcap * squashed, 1 - squashed * squashed
    distance = offsets(query.shape[2], key.shape[2], diagonal, query.device)
    if alibi_slopes is not None:
        scores = scores - wide(alibi_slopes)[..., None, None] * distance.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask.to(scores.dtype)
    if window_left >= 0 or window_right >= 0:
        scores = scores.masked_fill(~inside(distance, window_left, window_right), -torch.inf)
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
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    window_left: int,
    window_right: int,
    diagonal: int,
    softcap: float,
    needs: tuple[bool, ...],
    batch: int = 0,
) -> tuple[Tensor | None, ...]:
    """dS = P (dP - delta), delta = rowsum(dO O) - dlse; `out` and `lse` are computed again."""
    scores, slope = _scores(
        query, key, attn_mask, alibi_slopes, scale, window_left, window_right, diagonal, softcap
    )
    p, total = softmax(scores, sinks)
    dropped = p * dropout(seed, p, batch, dropout_p) if dropout_p else p
    dy, v, groups = wide(grad_out), wide(value), key.shape[1]
    dv = (_grouped(dropped, groups).mT @ _grouped(dy, groups)).sum(2)
    dp = _product(dy, v.mT)
    if dropout_p:
        dp = dp * dropout(seed, p, batch, dropout_p)
    delta = (p * dp).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(delta.dtype).masked_fill(total == -torch.inf, 0.0)
    ds = p * (dp - delta[..., None])
    dmask = dsinks = None
    if attn_mask is not None and needs[3]:
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    if sinks is not None and needs[4]:
        wanted = wide(sinks).to(total.dtype)[:, None]
        # a sink of -inf is no sink, and its row may see nothing
        share = (wanted - total.masked_fill(total == -torch.inf, 0.0)).exp()
        dsinks = -(share * delta).sum((0, 2)).to(sinks.dtype)
    dscores = ds * scale if slope is None else ds * slope * scale
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
    for b, rows, columns, options in sequences(*rest):
        q, k, v = (batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        args: tuple = (q, k, v, None, *options(q, k), b)
        out, lse = attend(*args)
        parts.append((packed(out), lse[0].t()))
    if not parts:
        return fake(query, key, value)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


attention_varlen_lse = attention_varlen


def sequences(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    scale: float,
    window_left: int,
    window_right: int,
    bottom_right: bool,
    softcap: float,
) -> Any:
    """Each sequence's number, query and key rows, and its dense options from its q and k."""
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    start = next(ends)
    for b, end in enumerate(ends):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else (
            alibi_slopes[b : b + 1]
        )  # fmt: skip

        def options(q: Tensor, k: Tensor, slopes: Tensor | None = slopes) -> tuple:
            diagonal = k.shape[2] - q.shape[2] if bottom_right else 0
            return (
                slopes, sinks, seed, dropout_p, scale, window_left, window_right, diagonal, softcap
            )  # fmt: skip

        yield b, slice(start[0], end[0]), slice(start[1], end[1]), options
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """Sequence by sequence."""
    *given, needs = rest
    ends = (cu_seqlens_q, cu_seqlens_k)
    dense = (*needs[:3], False, needs[3])
    dq: list[Any] = []
    dk: list[Any] = []
    dv: list[Any] = []
    dsinks: list[Any] = []
    for b, rows, columns, options in sequences(*ends, alibi_slopes, sinks, seed, *given):
        q, k, v = (batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        made = options(q, k)
        args: tuple = (
            batch_of_one(grad_out[rows]),
            None if grad_lse is None else grad_lse[rows].t().unsqueeze(0),
            q, k, v, None, *made[:3], out, lse, *made[3:], dense, b,
        )  # fmt: skip
        grads = attention_lse_backward(*args)
        for into, grad in zip((dq, dk, dv), grads, strict=False):
            into.append(None if grad is None else packed(grad))
        dsinks.append(grads[4])
    joined = [
        None if not needed else torch.cat(parts) if parts else torch.zeros_like(like)
        for parts, needed, like in zip((dq, dk, dv), needs, (query, key, value), strict=False)
    ]
    if not needs[3] or sinks is None:
        return (*joined, None)
    total = torch.stack([wide(d) for d in dsinks]).sum(0) if dsinks else torch.zeros_like(sinks)
    return (*joined, total.to(sinks.dtype))
