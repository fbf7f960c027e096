"""The ops of the family, registered.

`attention` and `attention_lse` are one computation: the first keeps lse for its backward, the
second gives it to the caller, and takes its gradient. A backend states the second's backward,
(grad_out, grad_lse or None, *saved, needs); the first's follows from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.core.op import Op
from fastllm.ops.attention import cache, cpu, quantized, reference, spec, stock, triton
from fastllm.ops.attention.cases import cases

# kernels by the name of the op: Backend(name, forward, the backward above, supports, available)
KERNELS: tuple[dict[str, Backend], ...] = (cpu.BACKENDS, triton.BACKENDS)


# products of the scores, from which the kernels win back what a call from Python costs
SMALL = 1 << 23
# queries that share a key head, up to which keys are read where they lie (attention_decode.inl);
# the numbers in the keys, from which that wins back the call; and queries without a group to share
# the keys with, up to which it does
FEW, READ, ALONE = 16, 1 << 20, 8
# keys, from which the kernels win: of float32 on one thread, where torch's product is as fast; of
# bfloat16 with an additive mask that has a row for each query, which is turned before it is added
LONG, LONG_MASKED = 512, 1024


def _stock_first(training: bool, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> bool:
    """What torch's own kernel takes as it is, where that was measured to be faster on CPUs.

    Heads of 16 to 256, lengths of 128 to 1024, with and without masks: a training step wins from
    SMALL on at all of them (1.4x to 3x), the forward pass but for what is named here.
    """
    o = spec.Terms(*rest)
    mask = o.attn_mask
    if not query.is_cpu or o.alibi_slopes is not None or o.sinks is not None:
        return False
    if o.dropout_p or o.softcap or o.left >= 0 or o.right > 0 or (o.right == 0 and o.diagonal):
        return False
    s = key.shape[2]
    if not training and _few(query, key):
        return key.numel() < READ or _crowd(query, key)
    if query.numel() * s < SMALL:
        return True
    if training:
        return False
    if query.dtype == torch.float32:
        return s < LONG and torch.get_num_threads() == 1
    added = mask is not None and mask.dtype != torch.bool and mask.shape[2] != 1
    return query.dtype == torch.bfloat16 and added and s < LONG_MASKED


def _cache_stock_first(training: bool, query: Tensor, key: Tensor, *rest: Any) -> bool:
    """Of keys in one piece; what lies in pages, torch would have to gather."""
    paged = rest[2] is not None
    return query.is_cpu and not paged and _few(query, key) and _crowd(query, key)


def _few(query: Tensor, key: Tensor) -> bool:
    return query.shape[2] * (query.shape[1] // max(1, key.shape[1])) <= FEW


def _crowd(query: Tensor, key: Tensor) -> bool:
    """More queries than share the read of a key, where no group of heads does."""
    return query.shape[1] == key.shape[1] and query.shape[2] > ALONE


def _without_lse(backend: Backend) -> Backend:
    """The backend of an op whose lse nobody sees, so that it has no gradient."""
    both: Callable[..., Any] | None = backend.backward
    assert both is not None

    def backward(grad_out: Tensor, *rest: Any) -> Any:
        return both(grad_out, None, *rest)

    return Backend(
        backend.name, backend.forward, backward, backend.supports, backend.available, backend.fast
    )


def _register(name: str, base: str, **facts: Any) -> Op:
    visible = name != base
    kernels = [table[base] for table in KERNELS if base in table]
    if not visible:
        kernels = [_without_lse(k) for k in kernels]
    facts.update(family="attention", schema=spec.SCHEMAS[name], cases=cases(name))
    facts.update({"outputs": 2} if visible else {"hidden": 1})
    facts["autocast_composite"] = ("cpu", "cuda")
    return define(name, (*kernels, stock.BACKENDS[name]), reference, **facts)


def _dense(name: str) -> Op:
    """args: query, key, value, attn_mask, alibi_slopes, sinks, seed, options."""
    return _register(
        name,
        "attention",
        tensors=(0, 1, 2, 3, 4, 5, 6),
        saved=lambda args, results: (*args[:7], *results[:2], *args[7:]),
        saved_tensors=(7, 0, 1, 2, 3, 4, 5, 6, 8),  # first what has the output's shape
        forward_args=lambda saved: (*saved[:7], *saved[9:]),
        gradients={0: 0, 1: 1, 2: 2, 3: 3, 5: 4},
        check=spec.check,
        fake=spec.fake,
        fake_backward=spec.fake_backward,
        cost=spec.cost,
        key=spec.word,
        stock_first=_stock_first if name == "attention" else None,
    )


def _varlen(name: str) -> Op:
    """args: query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options."""
    return _register(
        name,
        "attention_varlen",
        tensors=(0, 1, 2, 3, 4, 5, 6, 7),
        saved=lambda args, results: (*args[:8], *results[:2], *args[8:]),
        saved_tensors=(8, 0, 1, 2, 3, 4, 5, 6, 7, 9),
        forward_args=lambda saved: (*saved[:8], *saved[10:]),
        gradients={0: 0, 1: 1, 2: 2, 6: 3},
        check=spec.check_varlen,
        fake=spec.fake,
        fake_backward=spec.fake_varlen_backward,
        cost=spec.cost_varlen,
        key=spec.word_varlen,
        check_values=True,
    )


attention_op, attention_lse_op = _dense("attention"), _dense("attention_lse")
attention_varlen_op, attention_varlen_lse_op = (
    _varlen("attention_varlen"),
    _varlen("attention_varlen_lse"),
)


def _with_cache(name: str, contract: Any, **facts: Any) -> Op:
    """args: query, the cache, cache_seqlens, block_table, alibi_slopes, sinks, options."""
    return define(
        name,
        (*[table[name] for table in KERNELS], contract.STOCK),
        contract,
        family="attention",
        schema=contract.SCHEMA,
        saved=lambda args, results: args[:1],
        saved_tensors=(0,),
        gradients={},
        outputs=2,
        check=contract.check,
        fake=contract.fake,
        fake_backward=lambda query: (),
        cost=contract.cost,
        cases=cases(name),
        key=contract.word,
        check_values=True,
        **facts,
    )


attention_cache_op = _with_cache(
    "attention_cache", cache, tensors=tuple(range(7)), stock_first=_cache_stock_first
)
attention_quantized_op = _with_cache(
    "attention_quantized", quantized, tensors=(0, 1, 2, 3, 7, 8, 9, 13, 14, 15, 16)
)
