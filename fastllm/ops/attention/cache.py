"""The contract of attention to a cache: schema, checks, fake kernel, cost; reference and stock.

The op reads only: `cache_seqlens` counts what was appended, too. Query i of T stands at position
cache_seqlens[b] - T + i; lse and rows that see nothing are as in spec.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.core.tuner.routes import bucket, words
from fastllm.ops.attention import reference, spec, stock
from fastllm.ops.attention.spec import Cached, Terms

SCHEMA = Schema(
    params=(
        "Tensor query, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, "
        "Tensor? alibi_slopes, Tensor? sinks, float scale, int window_left, int window_right, "
        "float softcap"
    ),
    returns="(Tensor, Tensor)",
    backward_params="Tensor grad_out, Tensor? grad_lse, Tensor query",
    backward_returns="()",
)


def check_tensors(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    spec.require_tensors(query=query, k_cache=k_cache, v_cache=v_cache)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if query.is_floating_point() and cache.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype {query.dtype}, found {cache.dtype}")
    check_shapes(query, k_cache.shape, v_cache.shape, cache_seqlens, block_table)


def check_shapes(
    query: Tensor,
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    """The same, of what a cache of numbers and one of codes have in common."""
    if not query.is_floating_point():
        raise TypeError(f"query: expected a floating point tensor, found {describe(query)}")
    if query.dim() != 4:
        raise ValueError(f"query: expected [B, H, T, D], found {list(query.shape)}")
    b, h, _, d = query.shape
    for name, shape, width in (("k_cache", k_shape, d), ("v_cache", v_shape, None)):
        good = len(shape) == 4 and shape[1] and not h % shape[1]
        good = good and (block_table is not None or shape[0] == b)
        if not good or shape[3] != (width or shape[3]):
            lead = f"[{b}, G, S_max" if block_table is None else "[pages, G, page"
            raise ValueError(
                f"{name}: expected {lead}, {width or 'Dv'}] with G a divisor of {h} for query "
                f"{list(query.shape)}, found {list(shape)}"
            )
    if v_shape[:3] != k_shape[:3]:
        raise ValueError(
            f"v_cache: expected {[*k_shape[:3], v_shape[3]]} for k_cache {list(k_shape)}, found "
            f"{list(v_shape)}"
        )
    _check_ints("cache_seqlens", cache_seqlens, (b,))
    if block_table is not None:
        spec.require_tensors(block_table=block_table)
        _check_ints("block_table", block_table, (b, block_table.shape[-1] if b else 0))


def _check_ints(name: str, value: Any, shape: tuple[int, ...]) -> None:
    spec.require_tensors(**{name: value})
    if value.dtype != torch.int32 or tuple(value.shape) != shape:
        raise ValueError(
            f"{name}: expected an int32 tensor of shape {list(shape)}, found {describe(value)}"
        )


def check(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> None:
    """As check_tensors; lengths and pages that do not exist are found on the CPU."""
    o = Cached(*rest)
    check_tensors(query, k_cache, v_cache, *o[:2])
    spec.check_heads(o.alibi_slopes, o.sinks, *query.shape[:2])
    spec.check_numbers(o.left, o.right, o.softcap)
    check_values(k_cache, *o[:2], 0)


def check_values(
    k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, new: int
) -> list[int] | None:
    """The lengths, with room for `new` keys each; None where looking would be to wait."""
    lengths = spec.host_values(cache_seqlens)
    if lengths is None:
        return None
    size = k_cache.shape[2]
    room = size if block_table is None else size * block_table.shape[1]
    if any(n < 0 or n + new > room for n in lengths):
        raise ValueError(
            f"cache_seqlens: expected 0 to {room - new}, which leaves room for {new} keys in a "
            f"cache of {room}, found {lengths}"
        )
    if block_table is not None:
        count = k_cache.shape[0]
        for b, (row, n) in enumerate(zip(block_table.tolist(), lengths, strict=True)):
            used = row[: -(-(n + new) // size)] if size else []
            if any(not 0 <= page < count for page in used):
                raise ValueError(
                    f"block_table[{b}]: expected pages of 0 to {count - 1}, found {used}"
                )
    return lengths


def fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """out [B, H, T, Dv] and lse [B, H, T]."""
    return spec.fake(query, k_cache, v_cache)


def cost(query: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *_: Any) -> Cost:
    """Every key and value that is there is read once."""
    b, h, t, d = query.shape
    if type(cache_seqlens) is Tensor and not cache_seqlens.is_meta:
        keys = int(cache_seqlens.sum())
    else:
        keys = b * k_cache.shape[2]
    width = d + v_cache.shape[3]
    moved = keys * k_cache.shape[1] * width + b * h * t * width
    return Cost(moved * query.element_size(), 0, 2 * keys * h * t * width, 0)


def word(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> str:
    """The tuner's key: shapes, pages, window, options in use."""
    return word_of(query, k_cache.shape, v_cache.shape[3], Cached(*rest))


def word_of(query: Tensor, k_shape: tuple[int, ...], width: int, o: Cached) -> str:
    """The same, from the shape of keys and the width of values."""
    b, h, t, d = query.shape
    kind, table = words(query).partition("[")[0], o.block_table
    room = k_shape[2] * (1 if table is None else table.shape[1])
    used = (o.alibi_slopes is not None, o.sinks is not None, bool(o.softcap))
    return (
        f"{kind} b{bucket(b)} h{h} g{h // k_shape[1]} t{bucket(t)} s{bucket(room)} "
        f"d{d},{width} {'flat' if table is None else 'paged'} "
        f"{'-' if o.left < 0 else bucket(o.left)} {''.join('x' if u else '-' for u in used)}"
    )


# ---- plain torch


def sequences(query: Tensor, k_cache: Tensor, v_cache: Tensor, o: Cached) -> Iterator[tuple]:
    """Each sequence's arguments of the dense op."""
    t = query.shape[2]
    for b, n in enumerate(o.cache_seqlens.tolist()):
        slopes = o.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        k, v = (_keys(cache, b, n, o.block_table) for cache in (k_cache, v_cache))
        yield query[b : b + 1], k, v, *_terms(o, slopes, n - t)


def _terms(o: Cached, slopes: Tensor | None, diagonal: int) -> Terms:
    return Terms(None, slopes, o.sinks, None, 0.0, o.scale, o.left, o.right, diagonal, o.softcap)


def _keys(cache: Tensor, b: int, n: int, block_table: Tensor | None) -> Tensor:
    """[1, G, n, D]"""
    if block_table is None:
        return cache[b : b + 1, :, :n]
    pages = cache[block_table[b, : -(-n // max(1, cache.shape[2]))].long()]  # [pages, G, page, D]
    return pages.transpose(0, 1).flatten(1, 2)[None, :, :n]


def _joined(query: Tensor, v_cache: Tensor, parts: list[tuple[Tensor, Tensor]]) -> tuple:
    if not parts:
        return spec.fake(query, query, v_cache)
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def attention_cache(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """(out, lse), sequence by sequence, in float64."""
    if query.is_meta:
        return fake(query, k_cache, v_cache)
    parts = [reference.attend(*args) for args in sequences(query, k_cache, v_cache, Cached(*rest))]
    return _joined(query, v_cache, parts)


def attention_cache_backward(*_: Any) -> Any:
    """There is none: a cache is written in place, and keeps no graph."""
    raise RuntimeError("attention_with_kv_cache has no gradient: call it under torch.no_grad()")


def _stock(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """One call where all sequences are as long as each other, else sequence by sequence."""
    if query.is_meta:
        return fake(query, k_cache, v_cache)
    o = Cached(*rest)
    lengths = set(o.cache_seqlens.tolist())
    if len(lengths) != 1 or o.block_table is not None:
        parts = [_lean(*args) for args in sequences(query, k_cache, v_cache, o)]
        return _joined(query, v_cache, parts)
    n = lengths.pop()
    terms = _terms(o, o.alibi_slopes, n - query.shape[2])
    return _lean(query, k_cache[:, :, :n], v_cache[:, :, :n], *terms)


def _lean(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Dense attention; the one query of a step sees all of a causal cache."""
    o = Terms(*rest)
    if query.shape[2] == 1 and o.alibi_slopes is None and o.left < 0:
        o = o._replace(right=-1, diagonal=0)
    return stock.attention_lse(query, key, value, *o)


STOCK = Backend("torch", _stock, attention_cache_backward)
