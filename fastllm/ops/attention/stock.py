"""Stock PyTorch: F.scaled_dot_product_attention where it can say it, the plain formula elsewhere.

The baseline, and what runs where no kernel of ours serves or wins.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastllm.core.backend import Backend
from fastllm.ops.attention import reference, spec
from fastllm.ops.attention.spec import Packed, Terms


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, batch: int = 0) -> Tensor:
    o = Terms(*rest)
    special = o.sinks is not None or o.dropout_p or o.softcap or forward_ad._current_level >= 0
    mask = o.attn_mask
    # torch's own gives a mask no gradient where there is no query or no key
    if special or (mask is not None and not (query.numel() and key.numel())):
        return formula(query, key, value, o, batch)[0]
    causal = o.right == 0 and o.left < 0 and o.diagonal == 0
    causal = causal and mask is None and o.alibi_slopes is None
    if not causal:
        mask = joined_mask(query, key, o)
    return F.scaled_dot_product_attention(
        query, key, value, mask, 0.0, causal, scale=o.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def joined_mask(query: Tensor, key: Tensor, o: Terms) -> Tensor | None:
    """One mask that says what mask, slopes and window say; None if none is needed."""
    windowed, mask = o.left >= 0 or o.right >= 0, o.attn_mask
    if not windowed and o.alibi_slopes is None:
        return mask
    distance = reference.offsets(query.shape[2], key.shape[2], o.diagonal, query.device)
    seen = reference.inside(distance, o.left, o.right)
    if o.alibi_slopes is None:
        if mask is None or mask.dtype == torch.bool:
            return seen if mask is None else mask & seen
        return mask.masked_fill(~seen, -torch.inf)
    bias = -wide(o.alibi_slopes)[..., None, None] * distance.abs()
    if mask is not None and mask.dtype != torch.bool:
        bias = bias + mask
    elif mask is not None:
        bias = bias.masked_fill(~mask, -torch.inf)
    bias = bias.masked_fill(~seen, -torch.inf) if windowed else bias
    bias = bias if bias.dim() == 4 else bias.unsqueeze(0)
    return bias.to(query.dtype if query.dtype == torch.float64 else torch.float32)


def formula(
    query: Tensor, key: Tensor, value: Tensor, o: Terms, batch: int = 0
) -> tuple[Tensor, Tensor]:
    """(out, lse) as models write it: products in their dtype, softmax in float32."""
    groups = key.shape[1]
    q = query.unflatten(1, (groups, query.shape[1] // groups))
    scores = wide((q * o.scale) @ key.unsqueeze(2).mT).flatten(1, 2)
    if o.softcap:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    mask = joined_mask(query, key, o)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    p, lse = reference.softmax(scores, o.sinks)
    if o.dropout_p:
        p = p * reference.dropout(o.seed, p, batch, o.dropout_p)
    p = p.to(query.dtype).unflatten(1, (groups, query.shape[1] // groups))
    return (p @ value.unsqueeze(2)).flatten(1, 2), lse


def attention_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, batch: int = 0
) -> tuple[Tensor, Tensor]:
    """torch's flash attention on the CPU has an lse, without gradients."""
    o = Terms(*rest)
    grads = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    plain = o.attn_mask is None and o.alibi_slopes is None and o.sinks is None
    plain = plain and not (o.dropout_p or o.softcap or o.diagonal) and o.left < 0 and o.right <= 0
    same = value.shape[3] == query.shape[3] and query.numel() and key.numel()
    if grads or not plain or not same or not query.is_cpu or not _eager():
        return formula(query, key, value, o, batch)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, o.right == 0, scale=o.scale
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
    outs = [reference.packed(out) for out in _each(attention, query, key, value, *rest)]
    return torch.cat(outs) if outs else query.new_empty((0, query.shape[1], value.shape[2]))


def attention_varlen_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """The same, with lse [tokens, H]."""
    made = [] if query.is_meta else list(_each(attention_lse, query, key, value, *rest))
    if not made:
        return spec.fake(query, key, value)
    outs, lses = zip(*made, strict=True)
    return torch.cat([reference.packed(o) for o in outs]), torch.cat([x[0].t() for x in lses])


def _each(
    dense: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> Iterator[Any]:
    """What `dense` makes of each sequence."""
    for b, rows, columns, terms in reference.sequences(Packed(*rest)):
        q, k, v = (reference.batch_of_one(x) for x in (query[rows], key[columns], value[columns]))
        yield dense(q, k, v, *terms(q, k), batch=b)


def _serves(query: Tensor, *_: Any) -> str | None:
    """Its other checks are torch's own."""
    spec.require_tensors(query=query)
    return None


BACKENDS: dict[str, Backend] = {
    op.__name__: Backend("torch", op, supports=_serves)
    for op in (attention, attention_lse, attention_varlen, attention_varlen_lse)
}
