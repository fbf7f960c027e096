"""Stock PyTorch: F.scaled_dot_product_attention where it can say it, the plain formula elsewhere.

The baseline, and what runs where no kernel of ours serves or wins.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastllm.core.backend import Backend
from fastllm.ops.attention import reference, spec


def attention(
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
) -> Tensor:
    special = sinks is not None or dropout_p or softcap or forward_ad._current_level >= 0
    # torch's own gives a mask no gradient where there is no query or no key
    if special or (attn_mask is not None and not (query.numel() and key.numel())):
        return formula(
            query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, window_left,
            window_right, diagonal, softcap, batch,
        )[0]  # fmt: skip
    causal = window_right == 0 and window_left < 0 and diagonal == 0
    causal = causal and attn_mask is None and alibi_slopes is None
    if not causal:
        attn_mask = joined_mask(
            query, key, attn_mask, alibi_slopes, window_left, window_right, diagonal
        )
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, 0.0, causal, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def joined_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window_left: int,
    window_right: int,
    diagonal: int,
) -> Tensor | None:
    """One mask that says what mask, slopes and window say; None if none is needed."""
    windowed = window_left >= 0 or window_right >= 0
    if not windowed and alibi_slopes is None:
        return attn_mask
    distance = reference.offsets(query.shape[2], key.shape[2], diagonal, query.device)
    seen = reference.inside(distance, window_left, window_right)
    if alibi_slopes is None:
        if attn_mask is None or attn_mask.dtype == torch.bool:
            return seen if attn_mask is None else attn_mask & seen
        return attn_mask.masked_fill(~seen, -torch.inf)
    bias = -wide(alibi_slopes)[..., None, None] * distance.abs()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = bias + attn_mask
    elif attn_mask is not None:
        bias = bias.masked_fill(~attn_mask, -torch.inf)
    bias = bias.masked_fill(~seen, -torch.inf) if windowed else bias
    bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
    return bias.to(query.dtype if query.dtype == torch.float64 else torch.float32)


def formula(
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
    """(out, lse) as models write it: products in their dtype, softmax in float32."""
    groups = key.shape[1]
    q = query.unflatten(1, (groups, query.shape[1] // groups))
    scores = wide((q * scale) @ key.unsqueeze(2).mT).flatten(1, 2)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = joined_mask(query, key, attn_mask, alibi_slopes, window_left, window_right, diagonal)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    p, lse = reference.softmax(scores, sinks)
    if dropout_p:
        p = p * reference.dropout(seed, p, batch, dropout_p)
    p = p.to(query.dtype).unflatten(1, (groups, query.shape[1] // groups))
    return (p @ value.unsqueeze(2)).flatten(1, 2), lse


def attention_lse(
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
    """torch's flash attention on the CPU has an lse, without gradients."""
    grads = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    plain = attn_mask is None and alibi_slopes is None and sinks is None
    plain = plain and not (dropout_p or softcap or diagonal) and window_left < 0
    plain = plain and window_right <= 0
    same = value.shape[3] == query.shape[3] and query.numel() and key.numel()
    if grads or not plain or not same or not query.is_cpu or not _eager():
        return formula(
            query, key, value, attn_mask, alibi_slopes, sinks, seed, dropout_p, scale, window_left,
            window_right, diagonal, softcap, batch,
        )  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, window_right == 0, scale=scale
    )


def _eager() -> bool:
    """No transform or mode that torch's own kernel could not stand."""
    if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- packed sequences


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Sequence by sequence."""
    if query.is_meta:
        return spec.fake(query, key, value)[0]
    outs = [reference.packed(attention(*args)) for args in _parts(query, key, value, *rest)]
    return torch.cat(outs) if outs else query.new_empty((0, query.shape[1], value.shape[2]))


def attention_varlen_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The same, with lse [tokens, H]."""
    made = (
        [] if query.is_meta else [attention_lse(*args) for args in _parts(query, key, value, *rest)]
    )
    if not made:
        return spec.fake(query, key, value)
    outs, lses = zip(*made, strict=True)
    return torch.cat([reference.packed(o) for o in outs]), torch.cat([x[0].t() for x in lses])


def _parts(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Iterator[tuple]:
    """The dense arguments of each sequence."""
    for b, rows, columns, options in reference.sequences(*rest):
        q, k, v = (reference.batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        yield q, k, v, None, *options(q, k), b


def _serves(query: Tensor, *_: Any) -> str | None:
    """Its other checks are torch's own."""
    spec.require_tensors(query=query)
    return None


BACKENDS: dict[str, Backend] = {
    op.__name__: Backend("torch", op, supports=_serves)
    for op in (attention, attention_lse, attention_varlen, attention_varlen_lse)
}
