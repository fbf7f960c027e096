"""The contract of the attention ops: schemas, argument checks, fake kernels, costs.

The op under `scaled_dot_product_attention` is normalized. Of a query i and a key j of a batch:

- j is visible to i iff -window_left <= j - (i + diagonal) <= window_right; a window of -1 has no
  limit on that side. Causal is window_right = 0; `diagonal` is 0 where the first query stands at
  the first key (top left), S - T where the last stands at the last (bottom right).
- Query head h reads key head h // (H // G).
- score = (q . k) * scale; softcap c > 0 makes it c * tanh(score / c); then ALiBi adds
  -slope * |i + diagonal - j|; then the mask: additive, or boolean (False is -inf).
- sinks [H]: one more logit for each head, in the denominator only.
- lse is the natural logarithm of the denominator, sink included, float32 (float64 of float64).
- A row that sees nothing: out 0, lse -inf (the sink, if there is one), gradients 0.
- dropout: see `random.keep`; the same elements for the same seed on every backend.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.core.tuner.routes import bucket, words

_TENSORS = "Tensor query, Tensor key, Tensor value"
_LOGITS = "Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
_OPTIONS = (
    "float dropout_p, float scale, int window_left, int window_right, int diagonal, float softcap"
)
_VARLEN = (
    f"{_TENSORS}, Tensor cu_seqlens_q, Tensor cu_seqlens_k, {_LOGITS}",
    "int max_seqlen_q, int max_seqlen_k, float dropout_p, float scale, int window_left, "
    "int window_right, bool bottom_right, float softcap",
)


def _schema(tensors: str, options: str, grads: str, results: int) -> Schema:
    return Schema(
        params=f"{tensors}, {options}",
        returns="(Tensor, Tensor)",
        backward_params=f"{grads}, {tensors}, Tensor out, Tensor lse, {options}",
        backward_returns="(" + ", ".join(["Tensor"] * results) + ")",
    )


_DENSE = f"{_TENSORS}, Tensor? attn_mask, {_LOGITS}"
_ONE, _BOTH = "Tensor grad_out", "Tensor grad_out, Tensor? grad_lse"
SCHEMAS = {
    "attention": _schema(_DENSE, _OPTIONS, _ONE, 5),
    "attention_lse": _schema(_DENSE, _OPTIONS, _BOTH, 5),
    "attention_varlen": _schema(*_VARLEN, _ONE, 4),
    "attention_varlen_lse": _schema(*_VARLEN, _BOTH, 4),
}


# ---- arguments


class Terms(NamedTuple):
    """What makes attention of query, key and value: the dense op's other arguments, in order."""

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scale: float
    left: int
    right: int
    diagonal: int
    softcap: float


class Packed(NamedTuple):
    """The same of the packed op."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    dropout_p: float
    scale: float
    left: int
    right: int
    bottom_right: bool
    softcap: float


class Cached(NamedTuple):
    """The same of the op that reads a cache."""

    cache_seqlens: Tensor
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float
    left: int
    right: int
    softcap: float


def saved_parts(tensors: int, rest: tuple) -> tuple[tuple, Tensor, Tensor, tuple[bool, ...]]:
    """(terms, out, lse, needs) of a backward's arguments after value; `tensors` come before out."""
    out, lse = rest[tensors : tensors + 2]
    return (*rest[:tensors], *rest[tensors + 2 : -1]), out, lse, rest[-1]


def check(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    """Raises ValueError or TypeError that names the argument."""
    attn_mask, alibi_slopes, sinks, seed, dropout_p, _, left, right, _, softcap = rest
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        require_tensors(query=query, key=key, value=value)
    kind, qs, ks, vs = query.dtype, query.shape, key.shape, value.shape
    if not (query.is_floating_point() and key.dtype == kind and value.dtype == kind):
        require_dtypes(query, key, value)
    if len(qs) != 4:
        raise ValueError(f"query: expected [B, H, T, D], found {list(qs)}")
    b, h, t, d = qs
    if len(ks) != 4 or ks[0] != b or ks[3] != d or not ks[1] or h % ks[1]:
        raise ValueError(
            f"key: expected [{b}, G, S, {d}] with G a divisor of {h} for query {list(qs)}, "
            f"found {list(ks)}"
        )
    if len(vs) != 4 or vs[:3] != ks[:3]:
        raise ValueError(
            f"value: expected [{ks[0]}, {ks[1]}, {ks[2]}, Dv] for key {list(ks)}, found {list(vs)}"
        )
    if attn_mask is not None:
        check_mask(attn_mask, kind, (b, h, t, ks[2]))
    if alibi_slopes is not None or sinks is not None or dropout_p or seed is not None:
        check_heads(alibi_slopes, sinks, b, h)
        check_dropout(dropout_p, seed)
    if left < -1 or right < -1 or softcap < 0.0:
        check_numbers(left, right, softcap)


def require_tensors(**values: Any) -> None:
    """TypeError that names the first that is no tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")


def require_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """TypeError unless all three have one floating point dtype."""
    if not query.is_floating_point():
        raise TypeError(f"query: expected a floating point tensor, found {describe(query)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name}: expected query's dtype {query.dtype}, found {tensor.dtype}")


def check_mask(mask: Tensor, kind: torch.dtype, full: tuple[int, ...]) -> None:
    """A mask is boolean, of query's dtype or float32, and broadcasts to [B, H, T, S]."""
    require_tensors(attn_mask=mask)
    if mask.dtype not in (torch.bool, kind, torch.float32):
        raise TypeError(
            f"attn_mask: expected bool, float32 or query's dtype {kind}, found {mask.dtype}"
        )
    shape = mask.shape
    if len(shape) != 4 or any(m not in (1, n) for m, n in zip(shape, full, strict=True)):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {list(full)}, found {list(shape)}"
        )


def check_heads(alibi_slopes: Any, sinks: Any, b: int, h: int) -> None:
    """Slopes are [H] or [B, H], sinks [H], both floating."""
    for name, tensor, shapes in (
        ("alibi_slopes", alibi_slopes, ((h,), (b, h))),
        ("sinks", sinks, ((h,),)),
    ):
        if tensor is None:
            continue
        require_tensors(**{name: tensor})
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, found {describe(tensor)}")
        if tuple(tensor.shape) not in shapes:
            wanted = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(f"{name}: expected shape {wanted}, found {list(tensor.shape)}")


def check_probability(dropout_p: float) -> None:
    """ValueError unless it is one."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected 0 to 1, found {dropout_p}")


def check_dropout(dropout_p: float, seed: Any) -> None:
    """A probability; with a seed where it is not 0."""
    check_probability(dropout_p)
    if seed is None:
        if dropout_p:
            raise ValueError("seed: expected an int64 tensor of shape [1], found None")
        return
    require_tensors(seed=seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed: expected an int64 tensor of shape [1], found {describe(seed)}")


def check_numbers(window_left: int, window_right: int, softcap: float) -> None:
    """Window sizes are -1 (no limit), 0 or more; so is softcap."""
    if window_left < -1 or window_right < -1:
        raise ValueError(
            f"window: expected sizes of 0 or more, or -1 for no limit, "
            f"found {(window_left, window_right)}"
        )
    if not softcap >= 0.0:
        raise ValueError(f"softcap: expected 0 (off) or more, found {softcap}")


def check_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> None:
    """Raises ValueError or TypeError that names the argument.

    The values of cu_seqlens are checked where reading them costs no synchronization: on the CPU.
    """
    o = Packed(*rest)
    require_tensors(query=query, key=key, value=value)
    require_dtypes(query, key, value)
    if query.dim() != 3:
        raise ValueError(f"query: expected [tokens, H, D], found {list(query.shape)}")
    _, h, d = query.shape
    if key.dim() != 3 or key.shape[2] != d or not key.shape[1] or h % key.shape[1]:
        raise ValueError(
            f"key: expected [tokens, G, {d}] with G a divisor of {h} for query "
            f"{list(query.shape)}, found {list(key.shape)}"
        )
    if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value: expected [{key.shape[0]}, {key.shape[1]}, Dv] for key {list(key.shape)}, "
            f"found {list(value.shape)}"
        )
    for name, cu, most, rows in (
        ("cu_seqlens_q", o.cu_seqlens_q, o.max_seqlen_q, query.shape[0]),
        ("cu_seqlens_k", o.cu_seqlens_k, o.max_seqlen_k, key.shape[0]),
    ):
        _check_ends(name, cu, most, rows)
    if o.cu_seqlens_q.shape != o.cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected cu_seqlens_q's shape {list(o.cu_seqlens_q.shape)}, "
            f"found {list(o.cu_seqlens_k.shape)}"
        )
    check_heads(o.alibi_slopes, o.sinks, o.cu_seqlens_q.shape[0] - 1, h)
    check_dropout(o.dropout_p, o.seed)
    check_numbers(o.left, o.right, o.softcap)


def _check_ends(name: str, cu: Any, most: int, rows: int) -> None:
    require_tensors(**{name: cu})
    if cu.dtype != torch.int32 or cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"{name}: expected an int32 tensor of shape [B + 1], found {describe(cu)}")
    ends = host_values(cu)
    if ends is None:
        return
    sizes = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != rows or any(s < 0 for s in sizes):
        raise ValueError(f"{name}: expected to ascend from 0 to {rows} tokens, found {ends}")
    if max(sizes, default=0) > most:
        raise ValueError(
            f"max_seqlen_{name[-1]}: expected at least {max(sizes)}, the longest sequence, "
            f"found {most}"
        )


def host_values(tensor: Tensor) -> Any:
    """A tensor's values where reading them costs no synchronization, else None."""
    if not tensor.is_cpu or type(tensor) is not Tensor or torch.compiler.is_compiling():
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return None
    return tensor.tolist()


# ---- fake kernels


def statistics(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """out [B, H, T, Dv] (or [tokens, H, Dv]) and lse, its shape without the last dimension."""
    rows = query.shape[:-1]
    out = query.new_empty((*rows, value.shape[-1]))
    return out, query.new_empty(rows, dtype=statistics(query.dtype))


def fake_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple:
    """Gradients of query, key, value, attn_mask, sinks."""
    return tuple(_like(t) for t in (query, key, value, rest[0], rest[2]))


def fake_varlen_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple:
    """Gradients of query, key, value, sinks."""
    return tuple(_like(t) for t in (query, key, value, rest[3]))


def _like(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# ---- costs


def visible_pairs(t: int, s: int, left: int, right: int, diagonal: int) -> int:
    """How many (query, key) pairs a window lets see each other."""
    if left < 0 and right < 0:
        return t * s
    total = 0
    for i in range(t):
        first = max(0, i + diagonal - left) if left >= 0 else 0
        last = min(s - 1, i + diagonal + right) if right >= 0 else s - 1
        total += max(0, last - first + 1)
    return total


def cost(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Cost:
    """Two products of the visible pairs forward, five backward; every tensor is moved once.

    A bool mask's pairs are counted where it is at hand: not of fake tensors.
    """
    b, h, t, _ = query.shape
    o = Terms(*rest)
    pairs = b * h * visible_pairs(t, key.shape[2], o.left, o.right, o.diagonal)
    mask = o.attn_mask
    if type(mask) is Tensor and mask.dtype == torch.bool and not mask.is_meta:
        full = (b, h, t, key.shape[2])
        repeats = math.prod(n for n, own in zip(full, mask.shape, strict=True) if own == 1)
        pairs = min(pairs, int(mask.sum()) * repeats)
    return _cost(query, key, value, pairs)


def cost_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Cost:
    """As `cost`, summed over the sequences; of fake tensors, as if all were of the same length."""
    o = Packed(*rest)
    cu_q, cu_k = o[:2]
    batch = max(1, cu_q.shape[0] - 1)
    if type(cu_q) is Tensor and not cu_q.is_meta:
        ts, ss = cu_q.diff().tolist(), cu_k.diff().tolist()
    else:
        ts, ss = [query.shape[0] // batch] * batch, [key.shape[0] // batch] * batch
    pairs = sum(
        visible_pairs(t, s, o.left, o.right, s - t if o.bottom_right else 0)
        for t, s in zip(ts, ss, strict=True)
    )
    return _cost(query, key, value, pairs * query.shape[1])


def _cost(query: Tensor, key: Tensor, value: Tensor, pairs: int) -> Cost:
    d, dv = query.shape[-1], value.shape[-1]
    out = query.numel() // max(1, d) * dv
    moved = query.numel() + key.numel() + value.numel() + out
    size = query.element_size()
    return Cost(moved * size, 2 * moved * size, 2 * pairs * (d + dv), 2 * pairs * (3 * d + 2 * dv))


# ---- the tuner's key


def word(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str:
    """What decides about speed: heads, lengths, widths, the kind of mask, the options in use."""
    o = Terms(*rest)
    b, h, t, d = query.shape
    mask = "-" if o.attn_mask is None else str(o.attn_mask.dtype).removeprefix("torch.")
    g, s, dv = key.shape[1], key.shape[2], value.shape[3]
    return (
        f"{_kind(query)} b{bucket(b * h)} g{h // g} t{bucket(t)} s{bucket(s)} d{d},{dv} {mask} "
        f"{_used(o)}"
    )


def word_varlen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> str:
    """As `word`; a batch is known by its tokens and its longest sequences."""
    o, (n, h, d) = Packed(*rest), query.shape
    return (
        f"{_kind(query)} n{bucket(n * h)} g{h // key.shape[1]} t{bucket(o.max_seqlen_q)} "
        f"s{bucket(o.max_seqlen_k)} d{d},{value.shape[2]} {_used(o)}"
    )


def _kind(query: Tensor) -> str:
    return words(query).partition("[")[0]


def _used(o: Terms | Packed) -> str:
    """The window, and which options are in use."""
    used = (o.alibi_slopes is not None, o.sinks is not None, bool(o.dropout_p), bool(o.softcap))
    sizes = ("-" if n < 0 else bucket(n) for n in (o.left, o.right))
    return f"{','.join(map(str, sizes))} {''.join('x' if u else '-' for u in used)}"
