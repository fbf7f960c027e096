"""Attention in Triton: fastllm.kernels.attention*, imported by the first call."""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.memory import adjacent
from fastllm.ops.attention import random, triton_tiles
from fastllm.ops.attention.cache import attention_cache_backward
from fastllm.ops.attention.quantized import Codes, in_numbers, split
from fastllm.ops.attention.spec import Cached, Packed, Terms, saved_parts
from fastllm.ops.matmul.triton import available, tf32
from fastllm.ops.norm.triton import _interpreted
from fastllm.ops.quant.cpu import groups_fit
from fastllm.ops.quant.layout import INT4, INT8
from fastllm.ops.quant.triton import dequantize

Grads = tuple[Tensor | None, ...]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_WIDTH = 256
_MOST_EXACT = 64


def _module(name: str) -> Any:
    return importlib.import_module(f"fastllm.kernels.{name}")


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _dense(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, Any]:
    """The kernels' Shape and Options of a dense call."""
    o = Terms(*rest)
    shape = _module("attention_scores").Shape(
        *map(adjacent, (query, key, value)), _bytes(o.attn_mask), _solid(o.alibi_slopes),
        _solid(o.sinks), o.seed, tf32=tf32(query),
    )  # fmt: skip
    return shape, _options(o, o.diagonal)


def _solid(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _options(o: Terms | Packed, diagonal: int, bottom: bool = False) -> Any:
    return _module("attention_scores").Options(
        o.scale, o.left, o.right, diagonal, o.softcap, random.threshold(o.dropout_p),
        random.factor(o.dropout_p), o.dropout_p > 0.0, bottom,
    )  # fmt: skip


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    shape, options = _dense(*args)
    config = triton_tiles.forward_config(shape, options)
    return _module("attention").attention_fwd(shape, options, config)


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> Grads:
    """Gradients of query, key, value, attn_mask, sinks."""
    given, out, lse, needs = saved_parts(4, rest)
    shape, options = _dense(query, key, value, *given)
    dq, dk, dv, dmask, dsinks = _gradients(grad_out, grad_lse, shape, options, out, lse, needs)
    if dmask is not None:
        dmask = dmask.to(given[0].dtype)
    return dq, dk, dv, dmask, dsinks


def _gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    shape: Any,
    options: Any,
    out: Tensor,
    lse: Tensor,
    needs: tuple[bool, ...],
) -> Grads:
    config = triton_tiles.backward_config(shape, options)
    return _module("attention_backward").attention_bwd(
        adjacent(grad_out), grad_lse, shape, options, out, lse, needs, config
    )


def _packed(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Any, Any]:
    """The kernels' Shape and Options of a packed call."""
    o = Packed(*rest)
    shape = _module("attention_scores").Shape(
        *map(adjacent, (query, key, value)), None, _solid(o.alibi_slopes), _solid(o.sinks), o.seed,
        o.cu_seqlens_q.contiguous(), o.cu_seqlens_k.contiguous(), o.max_seqlen_q, o.max_seqlen_k,
        tf32(query),
    )  # fmt: skip
    return shape, _options(o, 0, o.bottom_right)


def attention_varlen(*args: Any) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    shape, options = _packed(*args)
    config = triton_tiles.forward_config(shape, options)
    return _module("attention").attention_fwd(shape, options, config)


def attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> Grads:
    """Gradients of query, key, value, sinks."""
    given, out, lse, needs = saved_parts(5, rest)
    shape, options = _packed(query, key, value, *given)
    wanted = (*needs[:3], False, needs[3])
    dq, dk, dv, _, dsinks = _gradients(grad_out, grad_lse, shape, options, out, lse, wanted)
    return dq, dk, dv, dsinks


def attention_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse)"""
    o = Cached(*rest)
    return _module("attention_decode").attention_decode(
        adjacent(query), adjacent(k_cache), adjacent(v_cache), o.cache_seqlens.contiguous(),
        _solid(o.block_table), _solid(o.alibi_slopes), _solid(o.sinks), *o[4:], tf32=tf32(query),
    )  # fmt: skip


def attention_quantized(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse); codes that the kernel does not read are dequantized first."""
    k, v, o = split(rest)
    if not (_readable(k) and _readable(v)):
        return in_numbers(query, rest, dequantize, attention_cache)
    kernels = _module("attention_decode")
    coded = [
        kernels.Coded(_solid(x.scales), _solid(x.zeros), x.code, x.group or x.width, x.width)
        for x in (k, v)
    ]
    return kernels.attention_decode(
        adjacent(query), adjacent(k.codes), adjacent(v.codes), o.cache_seqlens.contiguous(),
        _solid(o.block_table), _solid(o.alibi_slopes), _solid(o.sinks), *o[4:], tf32=tf32(query),
        coded=coded,
    )  # fmt: skip


def _readable(x: Codes) -> bool:
    return x.code in (INT8, INT4) and x.scales.dtype in _DTYPES


def _supports_quantized(query: Tensor, *rest: Any) -> str | None:
    k, v, o = split(rest)
    why = _supports(query, query, query) or _width(query, v.width)
    for tensor in (*k.tensors, *v.tensors, *o):
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            why = why or f"a tensor on {tensor.device} with query on {query.device}"
    return why or groups_fit(k.code, k.group) or groups_fit(v.code, v.group)


def _supports(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> str | None:
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    if query.device.type not in allowed:
        return f"query is on {query.device.type}"
    if query.dtype not in _DTYPES:
        return f"{query.dtype} query: computed by torch"
    for tensor in (key, value, *others):
        if isinstance(tensor, Tensor) and tensor.device != query.device:
            return f"a tensor on {tensor.device} with query on {query.device}"
    return _width(query, value.shape[-1])


def _width(query: Tensor, values: int) -> str | None:
    """Why heads of as many numbers as query's, and values of `values`, are not served."""
    width = max(query.shape[-1], values)
    if not 0 < width <= _MOST_WIDTH or not min(query.shape[-1], values):
        return f"heads of {query.shape[-1]} and {values} values"
    if query.dtype == torch.float32 and width > _MOST_EXACT and not _interpreted():
        # without TF32, products are made one by one, and backward has no registers for more
        return None if tf32(query) else f"float32 heads of {width} values without TF32"
    return None


BACKENDS: dict[str, Backend] = {
    "attention": Backend("triton", attention, attention_backward, _supports, available),
    "attention_varlen": Backend(
        "triton", attention_varlen, attention_varlen_backward, _supports, available
    ),
    "attention_cache": Backend(
        "triton", attention_cache, attention_cache_backward, _supports, available
    ),
    "attention_quantized": Backend(
        "triton", attention_quantized, attention_cache_backward, _supports_quantized, available
    ),
}
