"""Attention on the CPU kernels (csrc/cpu/kernels/attention.h): allocate, pass pointers."""

from array import array
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import POOL_FROM, empty
from fastllm.ops.attention.cache import attention_cache_backward

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BOOL, _NO_MASK = 3, -1
_NO_ROWS = (0, 0, 0, 0)
_MOST_WIDTH = 256


def _adjacent(x: Tensor) -> Tensor:
    """`x` with neighbours along the last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _dense(x: Tensor) -> tuple[int, ...]:
    """Address and strides of [B, H, T, D] or [B, H, T]."""
    return (x.data_ptr(), *x.stride()[:3])


def _packed(x: Tensor) -> tuple[int, ...]:
    """Address and strides of [tokens, H, D] or [tokens, H]."""
    return (x.data_ptr(), 0, x.stride(1), x.stride(0))


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Type, address and strides of a mask as it broadcasts to `shape`."""
    if mask is None:
        return (_NO_MASK, 0, 0, 0, 0, 0)
    code = _BOOL if mask.dtype == torch.bool else _CODES[mask.dtype]
    return (code, mask.data_ptr(), *mask.expand(shape).stride())


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _logits(slopes: Tensor | None, sinks: Tensor | None) -> tuple[int, ...]:
    """Addresses of float32 slopes, with the stride of their batch, and sinks."""
    batch = 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)
    return (_address(slopes), batch, _address(sinks))


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _dense_call(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, seed: int, out: Tensor, lse: Tensor, left: int, right: int,
    diagonal: int, first_batch: int = 0,
) -> tuple[int, ...]:  # fmt: skip
    """struct Call of attention.h, but for the numbers that are not integers."""
    b, h, t, d = q.shape
    g, s, dv = v.shape[1:]
    return (
        _CODES[q.dtype], b, h, g, t, s, d, dv,
        *_dense(q), *_dense(k), *_dense(v), *_dense(out), *_dense(lse),
        0, 0, 0, 0, 0, 0, *_mask(mask, (b, h, t, s)), *_logits(slopes, sinks),
        left, right, diagonal, 0, seed, first_batch, torch.get_num_threads(),
    )  # fmt: skip


def _forward(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, dropout_p: float,
    scale: float, window_left: int, window_right: int, diagonal: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _adjacent(query), _adjacent(key), _adjacent(value)
    out = empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    slopes, sink = _float(alibi_slopes), _float(sinks)
    call = _dense_call(
        q, k, v, attn_mask, slopes, sink, _seed(seed), out, lse, window_left, window_right,
        diagonal,
    )  # fmt: skip
    numbers = array("q", call)
    _C.attention_fwd(numbers.buffer_info()[0], scale, softcap, dropout_p)
    return out, lse


def _shared(mask: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a mask's gradient has to be summed over the batch."""
    return mask is not None and mask.shape[0] == 1 and shape[0] > 1


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, dropout_p: float, scale: float,
    window_left: int, window_right: int, diagonal: int, softcap: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    q, k, v, dout = map(_adjacent, (query, key, value, grad_out.to(query.dtype)))
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    terms = _sink_terms(sinks, lse, needs[4])
    wants_mask = attn_mask is not None and needs[3]
    shape = (*q.shape[:3], k.shape[2])
    slopes, sink, number = _float(alibi_slopes), _float(sinks), _seed(seed)
    # a mask shared by the batch: one entry at a time, so that its gradient is no larger than it
    step = 1 if wants_mask and _shared(attn_mask, shape) else max(1, shape[0])
    dmask = None
    for b in range(0, shape[0], step):
        part = slice(b, b + step)
        bias = attn_mask if attn_mask is None or attn_mask.shape[0] == 1 else attn_mask[part]
        slope = slopes if slopes is None or slopes.dim() == 1 else slopes[part]
        call = _dense_call(
            q[part], k[part], v[part], bias, slope, sink, number, out[part], lse[part],
            window_left, window_right, diagonal, b,
        )  # fmt: skip
        grads = [
            *_dense(dout[part]), *(_NO_ROWS if grad_lse is None else _dense(grad_lse[part])),
            *(_NO_ROWS if terms is None else _dense(terms[part])),
            *_dense(dq[part]), *_dense(dk[part]), *_dense(dv[part]),
        ]  # fmt: skip
        full = q.new_zeros((len(q[part]), *shape[1:]), dtype=torch.float32) if wants_mask else None
        _run_backward(call, grads, full, scale, softcap, dropout_p)
        if full is not None and bias is not None:
            summed = full.sum_to_size((len(bias), *bias.shape[1:]))
            dmask = summed if dmask is None else dmask + summed
    return (
        dq, dk, dv,
        None if dmask is None or attn_mask is None else dmask.to(attn_mask.dtype),
        _sink_gradient(sinks, terms, (0, 2)),
    )  # fmt: skip


def _run_backward(
    call: tuple[int, ...], grads: list[int], dmask: Tensor | None, scale: float, softcap: float,
    dropout_p: float,
) -> None:  # fmt: skip
    numbers = array("q", call)
    floats = _C.attention_bwd_room(numbers.buffer_info()[0])
    room = empty((floats,), torch.float32) if 4 * floats >= POOL_FROM else None
    masks = (0, 0, 0, 0) if dmask is None else (dmask.data_ptr(), *dmask.stride()[:3])
    numbers.extend((*grads, *masks, _address(room)))
    _C.attention_bwd(numbers.buffer_info()[0], scale, softcap, dropout_p)


def _sink_terms(sinks: Tensor | None, lse: Tensor, needed: bool) -> Tensor | None:
    """Room for what each query adds to the gradient of its head's sink."""
    return None if sinks is None or not needed else torch.empty_like(lse)


def _sink_gradient(sinks: Tensor | None, terms: Tensor | None, rows: Any) -> Tensor | None:
    """Their sum over all dimensions but the heads'."""
    return (
        None
        if sinks is None or terms is None
        else terms.sum(rows, dtype=torch.float64).to(sinks.dtype)
    )


def _varlen_call(
    q: Tensor, k: Tensor, v: Tensor, ends: tuple[Tensor, Tensor], slopes: Tensor | None,
    sinks: Tensor | None, seed: int, out: Tensor, lse: Tensor, sizes: tuple[int, int], left: int,
    right: int, bottom_right: bool,
) -> tuple[int, ...]:  # fmt: skip
    """struct Call of attention.h for packed sequences."""
    h, d = q.shape[1:]
    g, dv = v.shape[1:]
    return (
        _CODES[q.dtype], ends[0].shape[0] - 1, h, g, *sizes, d, dv,
        *_packed(q), *_packed(k), *_packed(v), *_packed(out), *_packed(lse),
        ends[0].data_ptr(), ends[1].data_ptr(), 0, 0, 0, 0, *_mask(None, ()),
        *_logits(slopes, sinks), left, right, 0, int(bottom_right), seed, 0,
        torch.get_num_threads(),
    )  # fmt: skip


def _forward_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, scale: float, window_left: int, window_right: int,
    bottom_right: bool, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _adjacent(query), _adjacent(key), _adjacent(value)
    out = empty((*q.shape[:2], v.shape[2]), q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    ends = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    slopes, sink = _float(alibi_slopes), _float(sinks)
    call = _varlen_call(
        q, k, v, ends, slopes, sink, _seed(seed), out, lse, (max_seqlen_q, max_seqlen_k),
        window_left, window_right, bottom_right,
    )  # fmt: skip
    numbers = array("q", call)
    _C.attention_fwd(numbers.buffer_info()[0], scale, softcap, dropout_p)
    return out, lse


def _backward_varlen(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None,
    seed: Tensor | None, out: Tensor, lse: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, scale: float, window_left: int, window_right: int, bottom_right: bool,
    softcap: float, needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    q, k, v, dout = map(_adjacent, (query, key, value, grad_out.to(query.dtype)))
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    terms = _sink_terms(sinks, lse, needs[3])
    ends = (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    slopes, sink = _float(alibi_slopes), _float(sinks)
    call = _varlen_call(
        q, k, v, ends, slopes, sink, _seed(seed), _adjacent(out), lse,
        (max_seqlen_q, max_seqlen_k), window_left, window_right, bottom_right,
    )  # fmt: skip
    grads = [
        *_packed(dout), *(_NO_ROWS if grad_lse is None else _packed(grad_lse)),
        *(_NO_ROWS if terms is None else _packed(terms)), *_packed(dq), *_packed(dk), *_packed(dv),
    ]  # fmt: skip
    _run_backward(call, grads, None, scale, softcap, dropout_p)
    return dq, dk, dv, _sink_gradient(sinks, terms, 0)


def _cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor,
    block_table: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, scale: float,
    window_left: int, window_right: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = _adjacent(query), _adjacent(k_cache), _adjacent(v_cache)
    b, h, t, d = q.shape
    out = empty((b, h, t, v.shape[3]), q.dtype)
    lse = torch.empty((b, h, t), dtype=torch.float32)
    lengths = cache_seqlens.contiguous()
    table = None if block_table is None else block_table.contiguous()
    pages = (0, 0, 0) if table is None else (table.data_ptr(), table.shape[1], k.shape[2])
    slopes, sink = _float(alibi_slopes), _float(sinks)
    call = (
        _CODES[q.dtype], b, h, k.shape[1], t, max(lengths.tolist(), default=0), d, v.shape[3],
        *_dense(q), *_dense(k), *_dense(v), *_dense(out), *_dense(lse), 0, 0, lengths.data_ptr(),
        *pages, *_mask(None, ()), *_logits(slopes, sink), window_left, window_right, 0, 1, 0, 0,
        torch.get_num_threads(),
    )  # fmt: skip
    numbers = array("q", call)
    _C.attention_fwd(numbers.buffer_info()[0], scale, softcap, 0.0)
    return out, lse


def _supports(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    if not query.is_cpu:
        return f"query on {query.device}: the kernels run on the CPU"
    if query.dtype not in _CODES:
        return f"{query.dtype} query: computed by torch"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _MOST_WIDTH or not min(query.shape[-1], value.shape[-1]):
        return f"a head of {widest}: the kernels take 1 to {_MOST_WIDTH}"
    return None


BACKENDS: dict[str, Backend] = {
    "attention": Backend("cpu", _forward, _backward, _supports),
    "attention_varlen": Backend("cpu", _forward_varlen, _backward_varlen, _supports),
    "attention_cache": Backend("cpu", _cache, attention_cache_backward, _supports),
}
