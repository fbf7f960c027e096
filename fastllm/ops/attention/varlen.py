"""attention_varlen: sequences of any lengths, packed one after the other."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.ops.attention import spec
from fastllm.ops.attention.dense import bounds, check_alignment, new_seed
from fastllm.ops.attention.ops import attention_varlen_lse_op, attention_varlen_op


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    causal_align: str = "top_left",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Attention within each of B packed sequences: no padding is computed, or stored.

    query         [tokens, H, D]; key [tokens_k, G, D]; value [tokens_k, G, Dv], G a divisor of H
    cu_seqlens_q  [B + 1] int32: sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1],
                  and the keys that cu_seqlens_k says
    max_seqlen_q  the longest sequence's queries, or more; max_seqlen_k the same of keys

    The other arguments as in `scaled_dot_product_attention`; the diagonal is each sequence's own.
    Returns [tokens, H, Dv], or that and lse [tokens, H] in float32. Raises ValueError or TypeError
    for arguments that do not fit; the values of cu_seqlens are looked at on the CPU only (a GPU
    would have to wait; there, what lies outside of the tokens is not attended).
    """
    spec.require_tensors(query=query, key=key, value=value)
    kind = casting(query)
    if kind is not None:
        query, key, value = cast(kind, query, key, value)
        with torch.autocast(kind, enabled=False):
            return attention_varlen(
                query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                dropout_p=dropout_p, is_causal=is_causal, scale=scale, causal_align=causal_align,
                window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
                return_lse=return_lse, backend=backend,
            )  # fmt: skip
    left, right = (-1, 0 if is_causal else -1) if window is None else bounds(window, is_causal)
    check_alignment(causal_align)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.dim() and query.shape[-1] else 1.0
    seed = None
    if dropout_p:
        spec.check_probability(dropout_p)
        seed = new_seed(query)
    op = attention_varlen_lse_op if return_lse else attention_varlen_op
    return op(
        query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed,
        int(max_seqlen_q), int(max_seqlen_k), dropout_p, scale, left, right,
        causal_align == "bottom_right", softcap, backend=backend,
    )  # fmt: skip
