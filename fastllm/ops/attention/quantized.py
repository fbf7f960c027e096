"""The contract of attention to a cache of codes: schema, checks, fake kernel, cost; plain torch.

As cache.py's op, with keys and values in the layout of fastllm.ops.quant.layout: the leading
dimensions of codes, scales and zeros are those of the cache, groups lie within a token and head.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.cases import Cost
from fastllm.core.op import Schema
from fastllm.core.tuner.routes import words
from fastllm.ops.attention import cache, spec
from fastllm.ops.attention.spec import Cached
from fastllm.ops.quant import layout
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant.spec import check_dequantize

SCHEMA = Schema(
    params=(
        "Tensor query, Tensor k_codes, Tensor k_scales, Tensor? k_zeros, int k_code, int k_group, "
        "SymInt k_width, Tensor v_codes, Tensor v_scales, Tensor? v_zeros, int v_code, "
        "int v_group, SymInt v_width, Tensor cache_seqlens, Tensor? block_table, "
        "Tensor? alibi_slopes, Tensor? sinks, float scale, int window_left, int window_right, "
        "float softcap"
    ),
    returns="(Tensor, Tensor)",
    backward_params="Tensor grad_out, Tensor? grad_lse, Tensor query",
    backward_returns="()",
)


class Codes(NamedTuple):
    """Keys, or values, of a cache: [B, G, S_max, width], or pages [P, G, page, width], as codes."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    code: int
    group: int
    width: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the numbers that the codes stand for."""
        return (*self.codes.shape[:-1], self.width)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales, and zeros where there are any."""
        return (self.codes, self.scales, *(() if self.zeros is None else (self.zeros,)))


def split(rest: tuple) -> tuple[Codes, Codes, Cached]:
    """The op's arguments after query."""
    return Codes(*rest[:6]), Codes(*rest[6:12]), Cached(*rest[12:])


def codes_of(name: str, given: Any) -> Codes:
    """A fastllm.quant.QTensor as Codes."""
    if isinstance(given, Codes):
        return given
    form = getattr(given, "format", None)
    if form is None:
        raise TypeError(f"{name}: expected a Tensor or a QTensor, found {type(given).__name__}")
    if form.double:
        raise ValueError(f"{name}: expected scales that are no codes themselves, found {form}")
    zeros = given.zeros if given.zeros.numel() or not form.symmetric else None
    return Codes(given.codes, given.scales, zeros, form.code, form.group, given.shape[-1])


def check_tensors(query: Tensor, k: Codes, v: Codes, *rest: Any) -> None:
    """Raises ValueError or TypeError that names the argument."""
    spec.require_tensors(query=query)
    for name, x in (("k_cache", k), ("v_cache", v)):
        if x.group < 0:
            raise ValueError(f"{name}: expected groups within a token, found group {x.group}")
        zeros = torch.empty(0) if x.zeros is None else x.zeros
        try:
            check_dequantize(x.codes, x.scales, zeros, x.code, x.group, x.width, torch.float32)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}.{error}") from None
    cache.check_shapes(query, k.shape, v.shape, *rest)


def check(query: Tensor, *rest: Any) -> None:
    """As check_tensors; lengths and pages that do not exist are found on the CPU."""
    k, v, o = split(rest)
    check_tensors(query, k, v, *o[:2])
    spec.check_heads(o.alibi_slopes, o.sinks, *query.shape[:2])
    spec.check_numbers(o.left, o.right, o.softcap)
    cache.check_values(k.codes, *o[:2], 0)


def fake(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """out [B, H, T, Dv] and lse [B, H, T]."""
    out = query.new_empty((*query.shape[:3], rest[11]))
    return out, query.new_empty(query.shape[:3], dtype=spec.statistics(query.dtype))


def cost(query: Tensor, *rest: Any) -> Cost:
    """Every code and scale that is in use is read once."""
    k, v, o = split(rest)
    used, (b, h, t, d) = o.cache_seqlens, query.shape
    known = type(used) is Tensor and not used.is_meta
    keys = int(used.sum()) if known else b * k.codes.shape[2]
    rows = max(1, k.codes.shape[0] * k.codes.shape[2])
    moved = sum(x.nbytes for x in (*k.tensors, *v.tensors)) * keys // rows
    moved += b * h * t * (d + v.width) * query.element_size()
    return Cost(moved, 0, 2 * keys * h * t * (d + v.width), 0)


def word(query: Tensor, *rest: Any) -> str:
    """The tuner's key: that of a cache of numbers, and what the codes are."""
    k, v, o = split(rest)
    plain = cache.word_of(query, k.shape, v.width, o)
    kinds = (f"{layout.KINDS[x.code]}.{x.group}" + "z" * (x.zeros is not None) for x in (k, v))
    return f"{plain} {' '.join(kinds)} {words(k.scales).partition('[')[0]}"


# ---- by way of numbers


def numbers(x: Codes, o: Cached, dtype: torch.dtype, dequantize: Callable[..., Tensor]) -> Tensor:
    """The cache in full, [B, G, S, width]: pages in order, no more keys than the longest has."""
    table, parts = o.block_table, x.tensors
    room = x.codes.shape[2] * (1 if table is None else table.shape[1])
    most = max(o.cache_seqlens.tolist(), default=0) if o.cache_seqlens.is_cpu else room
    if table is None:
        parts = tuple(p[:, :, :most] for p in parts)
    else:
        pages = table[:, : -(-most // max(1, x.codes.shape[2]))].long()
        parts = tuple(_bytes(p)[pages].transpose(1, 2).flatten(2, 3).view(p.dtype) for p in parts)
    codes, scales, *zeros = parts
    none = zeros[0] if zeros else scales.new_empty(0)
    return dequantize(codes, scales, none, x.code, x.group, x.width, dtype)


def _bytes(part: Tensor) -> Tensor:
    """float8 as bytes: torch cannot index it everywhere."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def in_numbers(
    query: Tensor, rest: tuple, dequantize: Callable[..., Tensor], attend: Callable[..., Any]
) -> Any:
    """What `attend`, a backend of attention to a cache of numbers, makes of the dequantized one."""
    k, v, o = split(rest)
    keys, values = (numbers(x, o, query.dtype, dequantize) for x in (k, v))
    return attend(query, keys, values, *o._replace(block_table=None))


def attention_quantized(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), sequence by sequence, in float64."""
    if query.is_meta:
        return fake(query, *rest)
    return in_numbers(query, rest, _exact, cache.attention_cache)


def _exact(
    codes: Tensor, scales: Tensor, zeros: Tensor, code: int, group: int, k: int, *_: Any
) -> Tensor:
    return quant.dequantize(codes, scales, zeros, code, group, k, torch.float64)


def _stock(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if query.is_meta:
        return fake(query, *rest)
    return in_numbers(query, rest, quant.dequantize, cache.STOCK.forward)


attention_quantized_backward = cache.attention_cache_backward
STOCK = Backend("torch", _stock, attention_quantized_backward)
