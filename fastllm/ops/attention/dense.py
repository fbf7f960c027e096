"""scaled_dot_product_attention: torch's arguments, normalized for the ops."""

import operator
from typing import Any

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.ops.attention import spec
from fastllm.ops.attention.ops import attention_lse_op, attention_op

_ALIGNMENTS = ("top_left", "bottom_right")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax(query key^T * scale + mask) value, as torch's own, and what language models add.

    FlashAttention (Dao et al. 2022; Dao 2023): no T x S matrix exists, forward or backward.

    query         [..., H, T, D] of a float dtype; scores and sums are float32 (float64 in float64)
    key           [..., G, S, D]; value [..., G, S, Dv]: batch sizes and heads broadcast as torch's
    attn_mask     broadcastable to [..., H, T, S]: bool (True: takes part), or added to the scores,
                  of query's dtype or float32; with is_causal, both hold
    dropout_p     share of the probabilities that is dropped, drawn from torch's generator: backward
                  drops the same; as torch's function, it does not know of training and eval
    is_causal     query i sees keys up to i, or up to i + S - T: see causal_align
    scale         None: 1 / sqrt(D)
    enable_gqa    G may be a divisor of H: query head h reads head h // (H // G)
    causal_align  "top_left" (torch's) or "bottom_right": where the diagonal of is_causal, of
                  window and of the distances of alibi_slopes lies
    window        (left, right): query i sees keys from i - left to i + right; -1: no limit
    softcap       0 (off), or scores become softcap * tanh(scores / softcap) (Gemma 2)
    alibi_slopes  [H] or [B, H]: adds -slope * distance to the scores (Press et al. 2022); they get
                  no gradient
    sinks         [H]: one more logit for each head that only the denominator has (gpt-oss)
    return_lse    also return the logarithm of the softmax's denominator, differentiable

    Returns [..., H, T, Dv], or that and lse [..., H, T] in float32. A query that sees no key gets
    0 and an lse of -inf (or its sink). Raises ValueError or TypeError for arguments that do not
    fit, fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    try:
        q, k, v = query.shape, key.shape, value.shape
    except AttributeError:
        spec.require_tensors(query=query, key=key, value=value)
        raise
    kind = casting(query)
    if kind is not None:
        query, key, value, attn_mask = cast(kind, query, key, value, attn_mask)
        with torch.autocast(kind, enabled=False):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa,
                causal_align=causal_align, window=window, softcap=softcap,
                alibi_slopes=alibi_slopes, sinks=sinks, return_lse=return_lse, backend=backend,
            )  # fmt: skip
    left, right = (-1, 0 if is_causal else -1) if window is None else bounds(window, is_causal)
    diagonal = 0
    if causal_align != "top_left":
        check_alignment(causal_align)
        diagonal = k[-2] - q[-2] if len(q) > 1 and len(k) > 1 else 0
    lead = None
    if (
        len(q) != 4 or len(k) != 4 or len(v) != 4 or q[0] != k[0] or q[0] != v[0] or k[1] != v[1]
        or (q[1] != k[1] and not enable_gqa)
        or (attn_mask is not None and not _fits(attn_mask, q))
    ):  # fmt: skip
        query, key, value, attn_mask, lead = folded(query, key, value, attn_mask, enable_gqa)
        q = query.shape
    if scale is None:
        scale = q[3] ** -0.5 if q[3] else 1.0
    seed = None
    if dropout_p:
        spec.check_probability(dropout_p)
        seed = new_seed(query)
    op = attention_lse_op if return_lse else attention_op
    out = op(
        query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, left, right,
        diagonal, softcap, backend=backend,
    )  # fmt: skip
    if lead is None:
        return out
    if return_lse:
        return tuple(x.reshape(*lead, *x.shape[2:]) for x in out)
    return out.reshape(*lead, *out.shape[2:])


def check_alignment(name: str) -> None:
    """ValueError unless it is one that exists."""
    if name not in _ALIGNMENTS:
        raise ValueError(f"causal_align: expected one of {_ALIGNMENTS}, found {name!r}")


def bounds(window: Any, is_causal: bool) -> tuple[int, int]:
    """(window_left, window_right) of a window and is_causal together."""
    try:
        left, right = map(operator.index, window)
    except (TypeError, ValueError):
        raise ValueError(f"window: expected (left, right), two ints, found {window!r}") from None
    spec.check_numbers(left, right, 0.0)
    return left, 0 if is_causal else right


def new_seed(like: Tensor) -> Tensor:
    """A seed from torch's generator of the device: what checkpointing restores."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device)


def _fits(mask: Tensor, query: torch.Size) -> bool:
    """Whether a mask has four dimensions, and no more batch and heads than query."""
    if not isinstance(mask, Tensor):
        return True  # the op says what is wrong
    shape = mask.shape
    return len(shape) == 4 and shape[0] in (1, query[0]) and shape[1] in (1, query[1])


def folded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """The tensors in four dimensions, broadcast as torch would, and the result's leading sizes."""
    spec.require_tensors(query=query, key=key, value=value)
    if mask is not None:
        spec.require_tensors(attn_mask=mask)
    given = {"query": query, "key": key, "value": value, "attn_mask": mask}
    for name, tensor in given.items():
        if tensor is not None and tensor.dim() < 2:
            raise ValueError(f"{name}: expected two dimensions or more, found {list(tensor.shape)}")
    count = max(t.dim() for t in given.values() if t is not None)
    full = max(4, count)
    tensors = [t if t is None else t[(None,) * (full - t.dim())] for t in given.values()]
    q, k, v, m = tensors
    assert q is not None and k is not None and v is not None
    batch = _broadcast("key", *[t.shape[:-3] for t in (q, k, v)])
    if m is not None:
        batch = _broadcast("attn_mask", batch, m.shape[:-3])
    heads, k, v = _heads(q, k, v, m, enable_gqa)
    q = q.expand(*batch, heads, *q.shape[-2:])
    k, v = (t.expand(*batch, *t.shape[-3:]) for t in (k, v))
    if m is not None and any(n != 1 for n in m.shape[:-3]):
        m = m.expand(*batch, *m.shape[-3:])
    if full > 4:
        q, k, v = (t.reshape(-1, *t.shape[-3:]) for t in (q, k, v))
        m = None if m is None else m.reshape(-1, *m.shape[-3:])
    lead = (*batch, heads)[full - count :] if count > 2 else ()
    return q, k, v, m, lead


def _broadcast(name: str, *shapes: Any) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        found = " and ".join(str(list(s)) for s in shapes)
        raise ValueError(
            f"{name}: expected batch sizes that broadcast with query's, found {found}"
        ) from None


def _heads(
    q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, enable_gqa: bool
) -> tuple[int, Tensor, Tensor]:
    """How many query heads there are, and key and value with the same number of heads."""
    heads, groups = q.shape[-3], (k.shape[-3], v.shape[-3])
    if enable_gqa:
        if any(not g or heads % g for g in groups):
            name = "key" if not groups[0] or heads % groups[0] else "value"
            raise ValueError(
                f"{name}: expected a number of heads that divides query's {heads}, "
                f"found {groups[name == 'value']}"
            )
        if groups[0] != groups[1]:
            k, v = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (k, v))
        return heads, k, v
    of_mask = 1 if m is None else m.shape[-3]
    try:
        (heads,) = torch.broadcast_shapes((heads,), *[(g,) for g in groups], (of_mask,))
    except RuntimeError:
        raise ValueError(
            f"key: expected query's {heads} heads or one, or enable_gqa=True, found "
            f"{groups[0]} of key and {groups[1]} of value"
        ) from None
    if groups[0] != groups[1]:
        k, v = (t.expand(*t.shape[:-3], heads, *t.shape[-2:]) for t in (k, v))
    return heads, k, v
