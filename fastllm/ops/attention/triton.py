"""Attention in Triton: fastllm.kernels.attention*, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.attention import random
from fastllm.ops.attention.cache import attention_cache_backward
from fastllm.ops.matmul.triton import available, tf32
from fastllm.ops.norm.triton import _interpreted

Grads = tuple[Tensor | None, ...]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 256


def _module(name: str) -> Any:
    return importlib.import_module(f"fastllm.kernels.{name}")


def _rows(x: Tensor) -> Tensor:
    """`x` with neighbours along the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _dense(
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
) -> tuple[Any, Any]:
    """The kernels' Shape and Options of a dense call."""
    scores = _module("attention_scores")
    shape = scores.Shape(
        _rows(query), _rows(key), _rows(value), _bytes(attn_mask),
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        None if sinks is None else sinks.contiguous(), seed, tf32=tf32(query),
    )  # fmt: skip
    options = scores.Options(
        scale, window_left, window_right, diagonal, softcap, random.threshold(dropout_p),
        random.factor(dropout_p), dropout_p > 0.0,
    )  # fmt: skip
    return shape, options


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    shape, options = _dense(*args)
    config = _module("attention_configs").forward_config(shape, options)
    return _module("attention").attention_fwd(shape, options, config)


def attention_backward(
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
    *rest: Any,
) -> Grads:
    """Gradients of query, key, value, attn_mask, sinks."""
    *given, needs = rest
    args: list[Any] = [query, key, value, attn_mask, alibi_slopes, sinks, seed, *given]
    shape, options = _dense(*args)
    config = _module("attention_configs").backward_config(shape, options)
    dq, dk, dv, dmask, dsinks = _module("attention_backward").attention_bwd(
        _rows(grad_out), grad_lse, shape, options, out, lse, tuple(needs), config
    )
    if dmask is not None and attn_mask is not None:
        dmask = dmask.to(attn_mask.dtype)
    return dq, dk, dv, dmask, dsinks


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
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
) -> tuple[Any, Any]:
    """The kernels' Shape and Options of a packed call."""
    scores = _module("attention_scores")
    shape = scores.Shape(
        _rows(query), _rows(key), _rows(value), None,
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        None if sinks is None else sinks.contiguous(), seed, cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k, tf32(query),
    )  # fmt: skip
    options = scores.Options(
        scale, window_left, window_right, 0, softcap, random.threshold(dropout_p),
        random.factor(dropout_p), dropout_p > 0.0, bottom_right,
    )  # fmt: skip
    return shape, options


def attention_varlen(*args: Any) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    shape, options = _packed(*args)
    config = _module("attention_configs").forward_config(shape, options)
    return _module("attention").attention_fwd(shape, options, config)


def attention_varlen_backward(
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
) -> Grads:
    """Gradients of query, key, value, sinks."""
    *given, needs = rest
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed)
    args: list[Any] = [*tensors, *given]
    shape, options = _packed(*args)
    config = _module("attention_configs").backward_config(shape, options)
    wanted = (*needs[:3], False, needs[3])
    dq, dk, dv, _, dsinks = _module("attention_backward").attention_bwd(
        _rows(grad_out), grad_lse, shape, options, out, lse, wanted, config
    )
    return dq, dk, dv, dsinks


def attention_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    table, slopes, offsets = (
        x if x is None else x.contiguous() for x in (block_table, alibi_slopes, sinks)
    )
    return _module("attention_decode").attention_decode(
        _rows(query), _rows(k_cache), _rows(v_cache), cache_seqlens.contiguous(), table, slopes,
        offsets, scale, window_left, window_right, softcap, tf32=tf32(query),
    )  # fmt: skip


def _supports(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    if query.device.type not in allowed:
        return f"query is on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"{query.dtype} query: computed by torch"
    for tensor in (key, value, *others):
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            return f"a tensor on {tensor.device} with query on {query.device}"
    width = max(query.shape[-1], value.shape[-1])
    if not 0 < width <= _MOST_WIDTH or not min(query.shape[-1], value.shape[-1]):
        return f"heads of {query.shape[-1]} and {value.shape[-1]} values"
    return None


BACKENDS: dict[str, Backend] = {
    "attention": Backend("triton", attention, attention_backward, _supports, available),
    "attention_varlen": Backend(
        "triton", attention_varlen, attention_varlen_backward, _supports, available
    ),
    "attention_cache": Backend(
        "triton", attention_cache, attention_cache_backward, _supports, available
    ),
}
