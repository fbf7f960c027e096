"""The public functions' calls that stand for an op's: what the bench times and checks."""

import functools
from collections.abc import Callable
from typing import Any

from fastllm.ops.attention.dense import scaled_dot_product_attention
from fastllm.ops.attention.kv_cache import attention_with_kv_cache
from fastllm.ops.attention.ops import (
    attention_cache_op,
    attention_op,
    attention_quantized_op,
    attention_varlen_op,
)
from fastllm.ops.attention.quantized import split
from fastllm.ops.attention.varlen import attention_varlen

Call = Callable[[], Any]


def _heads(query: Any, key: Any) -> bool:
    return query.shape[1] != key.shape[1]


def _window(left: int, right: int, causal: bool) -> tuple[int, int] | None:
    """The window beside is_causal, if there is one."""
    return None if (left < 0 and (causal or right < 0)) else (left, right)


def _given(**options: Any) -> dict[str, Any]:
    """Options that differ from their defaults, as a user writes a call."""
    return {k: v for k, v in options.items() if not (v is None or v is False or v == 0.0)}


def _extra(slopes: Any, sinks: Any) -> dict[str, Any]:
    found = {"alibi_slopes": slopes, "sinks": sinks}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def dense(query: Any, key: Any, value: Any, mask: Any, slopes: Any, sinks: Any, *rest: Any) -> Call:
    _, p, scale, left, right, diagonal, softcap = rest
    causal = right == 0
    bottom = diagonal == key.shape[2] - query.shape[2] and diagonal != 0
    options = _given(
        dropout_p=p, is_causal=causal, enable_gqa=_heads(query, key), softcap=softcap,
        causal_align="bottom_right" if bottom else None, window=_window(left, right, causal),
    )  # fmt: skip
    options |= _extra(slopes, sinks) | ({} if mask is None else {"attn_mask": mask})
    return functools.partial(
        scaled_dot_product_attention, query, key, value, scale=scale, **options
    )


def packed(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, *rest: Any) -> Call:
    slopes, sinks, _, most_q, most_k, p, scale, left, right, bottom, softcap = rest
    causal = right == 0
    options = _given(
        dropout_p=p, is_causal=causal, softcap=softcap, window=_window(left, right, causal),
        causal_align="bottom_right" if bottom else None,
    )  # fmt: skip
    options |= _extra(slopes, sinks)
    args = (query, key, value, cu_q, cu_k, most_q, most_k)
    return functools.partial(attention_varlen, *args, scale=scale, **options)


def cached(query: Any, k_cache: Any, v_cache: Any, used: Any, table: Any, *rest: Any) -> Call:
    slopes, sinks, scale, left, right, softcap = rest
    options = _given(softcap=softcap, window=_window(left, right, right == 0))
    options |= _extra(slopes, sinks) | ({} if table is None else {"block_table": table})
    return functools.partial(
        attention_with_kv_cache, query, k_cache, v_cache, used, is_causal=right == 0, scale=scale,
        return_lse=True, **options,
    )  # fmt: skip


def quantized_cache(query: Any, *rest: Any) -> Call:
    return cached(query, *split(rest)[:2], *rest[12:])


attention_op.call, attention_varlen_op.call, attention_cache_op.call = dense, packed, cached
attention_quantized_op.call = quantized_cache
