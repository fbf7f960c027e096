"""attention_with_kv_cache: append to a cache, contiguous or in pages, and attend to it."""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.attention import cache, quantized, spec
from fastllm.ops.attention.dense import bounds
from fastllm.ops.attention.ops import attention_cache_op, attention_quantized_op
from fastllm.ops.quant import quantize


def attention_with_kv_cache(
    query: Tensor,
    k_cache: Any,
    v_cache: Any,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """Writes k and v behind what the cache holds, and attends to all of it. Any T; no gradient.

    query          [B, H, T, D]: the last T positions of each sequence
    k_cache        [B, G, S_max, D], v_cache [B, G, S_max, Dv]; or with a block_table, pages
                   [P, G, page, D] and [P, G, page, Dv] (PagedAttention, Kwon et al. 2023). Both
                   a Tensor of query's dtype, or both a fastllm.quant.QTensor of these shapes,
                   whose groups lie within a row, of one format or two: int8 and int4 codes are
                   read as they are, others dequantized first
    cache_seqlens  [B] int32: how many keys of each sequence the cache holds, without k. It is not
                   written: add T before the next call
    k, v           [B, G, T_new, D] and [B, G, T_new, Dv], written at cache_seqlens, in place, and
                   as codes if the cache has those; None: nothing is written
    block_table    [B, pages] int32: the pages of each sequence, in order
    is_causal      the last query sees every key, each one before it a key less

    The other arguments as in `scaled_dot_product_attention`, with the diagonal at the bottom right.
    Returns [B, H, T, Dv], or that and lse [B, H, T] in float32. Raises ValueError or TypeError for
    arguments that do not fit, before anything is written: a cache without room is found on the CPU;
    on a GPU, which would have to wait, what has no room is not written.
    """
    spec.require_tensors(query=query)
    coded = not isinstance(k_cache, Tensor)
    if coded == isinstance(v_cache, Tensor):
        both = f"{type(k_cache).__name__} and {type(v_cache).__name__}"
        raise TypeError(f"v_cache: expected a Tensor or a QTensor, as k_cache is; found {both}")
    if coded:
        k_cache, v_cache = (
            quantized.codes_of(name, x) for name, x in (("k_cache", k_cache), ("v_cache", v_cache))
        )
    used = cache_seqlens
    if k is not None or v is not None:  # else the op itself looks
        (quantized if coded else cache).check_tensors(
            query, k_cache, v_cache, cache_seqlens, block_table
        )
        check_new(k, v, query, k_cache, v_cache)
        assert k is not None and v is not None
        used = cache_seqlens + k.shape[2]
        pages = k_cache.codes if coded else k_cache
        lengths = cache.check_values(pages, cache_seqlens, block_table, k.shape[2])
        spec.check_heads(alibi_slopes, sinks, *query.shape[:2])
        spec.check_numbers(-1, -1, softcap)
    left, right = (-1, 0 if is_causal else -1) if window is None else bounds(window, is_causal)
    if k is not None and v is not None:
        for states, into in ((k, k_cache), (v, v_cache)):
            for part, made in _parts(into, states):
                append(part, made, cache_seqlens, block_table, lengths)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.shape[-1] else 1.0
    rest = (used, block_table, alibi_slopes, sinks, scale, left, right, softcap)
    if coded:
        results = attention_quantized_op(query, *k_cache, *v_cache, *rest, backend=backend)
    else:
        results = attention_cache_op(query, k_cache, v_cache, *rest, backend=backend)
    return results if return_lse else results[0]


def _parts(into: Any, states: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
    """What of `states` goes where: themselves, or their codes, scales and zeros."""
    if isinstance(into, Tensor):
        return ((into, states),)
    made = quantize(states, into.code, into.group, into.zeros is None)
    bytes_of = (into.codes.view(torch.uint8), made[0].view(torch.uint8))  # float8 has no index_put
    return (bytes_of, *zip(into.tensors[1:], made[1:], strict=False))


def check_new(k: Any, v: Any, query: Tensor, k_cache: Any, v_cache: Any) -> None:
    """k and v come together, and fit query and the cache."""
    spec.require_tensors(k=k, v=v)
    for name, new, old in (("k", k, k_cache), ("v", v, v_cache)):
        wanted = (query.shape[0], old.shape[1], k.shape[2] if k.dim() == 4 else 1, old.shape[3])
        if tuple(new.shape) != wanted:
            raise ValueError(f"{name}: expected shape {list(wanted)}, found {list(new.shape)}")
        kind = old.dtype if isinstance(old, Tensor) else query.dtype
        if new.dtype != kind:
            raise TypeError(f"{name}: expected the cache's {kind}, found {new.dtype}")


def append(
    pages: Tensor,
    new: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    lengths: list[int] | None,
) -> None:
    """Writes new [B, G, T, D] at each sequence's end; `lengths`: known, and with room."""
    count, device = new.shape[2], new.device
    if lengths and block_table is None and len(set(lengths)) == 1:
        pages[:, :, lengths[0] : lengths[0] + count].copy_(new)
        return
    width = pages.shape[2]
    room = width if block_table is None else width * block_table.shape[1]
    place = cache_seqlens.long()[:, None] + torch.arange(count, device=device)
    batch = torch.arange(new.shape[0], device=device)[:, None]
    values = new.transpose(1, 2)
    if lengths is None and room and count:
        # what has no room repeats the first key's write; if that has none, it writes what is there
        inside = (place >= 0) & (place < room)
        step = torch.where(inside, torch.arange(count, device=device), 0)
        place = place.gather(1, step).clamp(0, room - 1)
        values, fits = values[batch, step], inside[:, :1, None, None]
        rows, slot = _slots(batch, place, block_table, width)
        values = torch.where(fits, values, pages[rows, :, slot])
    else:
        rows, slot = _slots(batch, place, block_table, width)
    pages[rows, :, slot] = values


def _slots(
    batch: Tensor, place: Tensor, block_table: Tensor | None, width: int
) -> tuple[Tensor, Tensor]:
    """(page, place in it) of positions [B, T] of each sequence."""
    if block_table is None:
        return batch.expand_as(place), place
    return block_table.long().gather(1, place // width), place % width
