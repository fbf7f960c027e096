"""Attention on the CPU kernels (csrc/cpu/kernels/attention.h): allocate, pass pointers."""

from array import array
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import POOL_FROM, adjacent, empty
from fastllm.ops.attention.cache import attention_cache_backward
from fastllm.ops.attention.quantized import Codes, in_numbers, split
from fastllm.ops.attention.spec import Cached, Packed, Terms, saved_parts
from fastllm.ops.quant.cpu import dequantize, groups_fit
from fastllm.ops.quant.layout import INT4, INT8

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BOOL, _NO_MASK = 3, -1
_NO_ROWS = (0, 0, 0, 0)
_MOST_WIDTH = 256
_FEW = 16  # kFewQueries of attention_decode.inl


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


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class _Numbers:
    """A call's arguments (struct Call of attention.h); keeps what its addresses point to."""

    def __init__(
        self,
        o: Terms | Packed | Cached,
        sizes: tuple[int, ...],
        tensors: tuple[int, ...],
        lists: tuple[Tensor | None, ...] = (None, None, None, None),
        page: int = 0,
        mask: tuple[int, ...] = (_NO_MASK, 0, 0, 0, 0, 0),
        diagonal: tuple[int, bool] = (0, False),
        seed: int = 0,
        first_batch: int = 0,
    ) -> None:
        slopes, sinks = (
            None if x is None else x.float().contiguous() for x in (o.alibi_slopes, o.sinks)
        )
        self.kept = (slopes, sinks)
        batch = 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)
        pages = lists[3]
        self.list = array("q", (
            *sizes, *tensors, *map(_address, lists), 0 if pages is None else pages.shape[1], page,
            *mask, _address(slopes), batch, _address(sinks), o.left, o.right, *diagonal, seed,
            first_batch, torch.get_num_threads(),
        ))  # fmt: skip
        p = 0.0 if isinstance(o, Cached) else o.dropout_p
        self.rest = (o.scale, o.softcap, p)

    def forward(self) -> None:
        _C.attention_fwd(self.list.buffer_info()[0], *self.rest)

    def backward(self, grads: list[int], dmask: Tensor | None) -> None:
        floats = _C.attention_bwd_room(self.list.buffer_info()[0])
        room = empty((floats,), torch.float32) if 4 * floats >= POOL_FROM else None
        masks = (0, 0, 0, 0) if dmask is None else (dmask.data_ptr(), *dmask.stride()[:3])
        self.list.extend((*grads, *masks, _address(room)))
        _C.attention_bwd(self.list.buffer_info()[0], *self.rest)


def _dense_call(
    o: Terms, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seed: int, first: int = 0
) -> _Numbers:
    (b, h, t, d), (g, s, dv) = q.shape, v.shape[1:]
    return _Numbers(
        o, (_CODES[q.dtype], b, h, g, t, s, d, dv),
        (*_dense(q), *_dense(k), *_dense(v), *_dense(out), *_dense(lse)),
        mask=_mask(o.attn_mask, (b, h, t, s)), diagonal=(o.diagonal, False), seed=seed,
        first_batch=first,
    )  # fmt: skip


def _seed(o: Terms | Packed) -> int:
    return 0 if o.seed is None else int(o.seed)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    o = Terms(*rest)
    q, k, v = adjacent(query), adjacent(key), adjacent(value)
    out = empty((*q.shape[:3], v.shape[3]), q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    _dense_call(o, q, k, v, out, lse, _seed(o)).forward()
    return out, lse


def _shared(mask: Tensor | None, shape: tuple[int, ...]) -> bool:
    """Whether a mask's gradient has to be summed over the batch."""
    return mask is not None and mask.shape[0] == 1 and shape[0] > 1


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    given, out, lse, needs = saved_parts(4, rest)
    o = Terms(*given)
    q, k, v, dout = map(adjacent, (query, key, value, grad_out.to(query.dtype)))
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    terms, mask, seed = _sink_terms(o.sinks, lse, needs[4]), o.attn_mask, _seed(o)
    wants_mask = mask is not None and needs[3]
    shape = (*q.shape[:3], k.shape[2])
    # a mask shared by the batch: one entry at a time, so that its gradient is no larger than it
    step = 1 if wants_mask and _shared(mask, shape) else max(1, shape[0])
    dmask = None
    for b in range(0, shape[0], step):
        part = slice(b, b + step)
        bias = mask if mask is None or mask.shape[0] == 1 else mask[part]
        slopes = o.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[part]
        numbers = _dense_call(
            o._replace(attn_mask=bias, alibi_slopes=slopes), q[part], k[part], v[part], out[part],
            lse[part], seed, b,
        )  # fmt: skip
        grads = [
            *_dense(dout[part]), *(_NO_ROWS if grad_lse is None else _dense(grad_lse[part])),
            *(_NO_ROWS if terms is None else _dense(terms[part])),
            *_dense(dq[part]), *_dense(dk[part]), *_dense(dv[part]),
        ]  # fmt: skip
        full = q.new_zeros((len(q[part]), *shape[1:]), dtype=torch.float32) if wants_mask else None
        numbers.backward(grads, full)
        if full is not None and bias is not None:
            summed = full.sum_to_size((len(bias), *bias.shape[1:]))
            dmask = summed if dmask is None else dmask + summed
    return (
        dq, dk, dv,
        None if dmask is None or mask is None else dmask.to(mask.dtype),
        _sink_gradient(o.sinks, terms, (0, 2)),
    )  # fmt: skip


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


def _varlen_call(o: Packed, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> _Numbers:
    (h, d), (g, dv) = q.shape[1:], v.shape[1:]
    ends = o.cu_seqlens_q, o.cu_seqlens_k
    return _Numbers(
        o, (_CODES[q.dtype], len(ends[0]) - 1, h, g, o.max_seqlen_q, o.max_seqlen_k, d, dv),
        (*_packed(q), *_packed(k), *_packed(v), *_packed(out), *_packed(lse)), (*ends, None, None),
        diagonal=(0, o.bottom_right), seed=_seed(o),
    )  # fmt: skip


def _solid_ends(o: Packed) -> Packed:
    return o._replace(
        cu_seqlens_q=o.cu_seqlens_q.contiguous(), cu_seqlens_k=o.cu_seqlens_k.contiguous()
    )


def _forward_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    o = _solid_ends(Packed(*rest))
    q, k, v = adjacent(query), adjacent(key), adjacent(value)
    out = empty((*q.shape[:2], v.shape[2]), q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    _varlen_call(o, q, k, v, out, lse).forward()
    return out, lse


def _backward_varlen(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    given, out, lse, needs = saved_parts(5, rest)
    o = _solid_ends(Packed(*given))
    q, k, v, dout = map(adjacent, (query, key, value, grad_out.to(query.dtype)))
    dq, dk, dv = (empty(x.shape, x.dtype) for x in (q, k, v))
    terms = _sink_terms(o.sinks, lse, needs[3])
    grads = [
        *_packed(dout), *(_NO_ROWS if grad_lse is None else _packed(grad_lse)),
        *(_NO_ROWS if terms is None else _packed(terms)), *_packed(dq), *_packed(dk), *_packed(dv),
    ]  # fmt: skip
    _varlen_call(o, q, k, v, adjacent(out), lse).backward(grads, None)
    return dq, dk, dv, _sink_gradient(o.sinks, terms, 0)


def _cache(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    o, q = Cached(*rest), adjacent(query)
    out, lse, numbers = _cache_call(q, adjacent(k_cache), adjacent(v_cache), v_cache.shape[3], o)
    numbers.forward()
    return out, lse


def _cache_call(
    q: Tensor, k: Tensor, v: Tensor, width: int, o: Cached
) -> tuple[Tensor, Tensor, _Numbers]:
    """(out, lse, the call), for values of `width` numbers."""
    b, h, t, d = q.shape
    out = empty((b, h, t, width), q.dtype)
    lse = torch.empty((b, h, t), dtype=torch.float32)
    lengths = o.cache_seqlens.contiguous()
    table = None if o.block_table is None else o.block_table.contiguous()
    longest = max(lengths.tolist(), default=0)
    return out, lse, _Numbers(
        o, (_CODES[q.dtype], b, h, k.shape[1], t, longest, d, width),
        (*_dense(q), *_dense(k), *_dense(v), *_dense(out), *_dense(lse)),
        (None, None, lengths, table), 0 if table is None else k.shape[2], diagonal=(0, True),
    )  # fmt: skip


def _quantized(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Few queries read the codes; for more, which share the work, numbers are made once."""
    k, v, o = split(rest)
    rows = query.shape[2] * (query.shape[1] // k.codes.shape[1])
    if rows > _FEW or not (_readable(k) and _readable(v)):
        return in_numbers(query, rest, dequantize, _cache)
    k, v = (x._replace(codes=adjacent(x.codes)) for x in (k, v))
    lists = [_codes(x) for x in (k, v)]
    out, lse, numbers = _cache_call(adjacent(query), k.codes, v.codes, v.width, o)
    for given, _ in lists:
        numbers.list.extend(given)
    _C.attention_codes(numbers.list.buffer_info()[0], *numbers.rest[:2])
    return out, lse


def _readable(x: Codes) -> bool:
    """Codes that the kernel reads: groups fill its vectors."""
    whole = x.group % 32 == 0 or x.scales.shape[-1] == 1
    return x.code in (INT8, INT4) and whole and x.scales.dtype in _CODES


def _codes(x: Codes) -> tuple[tuple[int, ...], Any]:
    """struct Codes of attention.h, and the tensors that it points to."""
    scales, groups = adjacent(x.scales), x.scales.shape[-1]
    zeros = None if x.zeros is None else adjacent(x.zeros)
    return (
        x.code, _CODES[scales.dtype], x.width if groups == 1 else x.group, groups, *_dense(scales),
        *(_NO_ROWS if zeros is None else _dense(zeros)),
    ), (scales, zeros)  # fmt: skip


def _supports(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> str | None:
    if not query.is_cpu:
        return f"query on {query.device}: the kernels run on the CPU"
    if query.dtype not in _CODES:
        return f"{query.dtype} query: computed by torch"
    widest = max(query.shape[-1], value.shape[-1])
    if widest > _MOST_WIDTH or not min(query.shape[-1], value.shape[-1]):
        return f"a head of {widest}: the kernels take 1 to {_MOST_WIDTH}"
    return None


def _supports_quantized(query: Tensor, *rest: Any) -> str | None:
    k, v, _ = split(rest)
    return _supports(query, query, query.new_empty((v.width,)), *rest) or next(
        (why for x in (k, v) if (why := groups_fit(x.code, x.group))), None
    )


BACKENDS: dict[str, Backend] = {
    "attention": Backend("cpu", _forward, _backward, _supports),
    "attention_varlen": Backend("cpu", _forward_varlen, _backward_varlen, _supports),
    "attention_cache": Backend("cpu", _cache, attention_cache_backward, _supports),
    "attention_quantized": Backend(
        "cpu", _quantized, attention_cache_backward, _supports_quantized
    ),
}
