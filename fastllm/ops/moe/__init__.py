"""Rows to their experts and back: moe_route, moe_permute, moe_unpermute."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import Op
from fastllm.ops.moe import cpu, reference, spec, stock, triton
from fastllm.ops.moe.cases import cases

TABLES = (cpu.BACKENDS, triton.BACKENDS, stock.BACKENDS)


def _register(name: str, **facts: Any) -> Op:
    """The op `name`: what its name settles, and the facts that are its own."""
    backends = [table[name] for table in TABLES]
    facts.update(family="moe", schema=spec.SCHEMAS[name], cost=spec.cost, cases=cases(name))
    return define(name, backends, reference, **facts)


# positions are integers: the checks look at them
moe_permute_op = _register(
    "moe_permute",
    tensors=(0,),
    saved_tensors=(0, 1),
    gradients={0: 0},
    check=spec.check_permute,
    fake=spec.fake_permute,
    fake_backward=spec.fake_permute_backward,
)
moe_unpermute_op = _register(
    "moe_unpermute",
    tensors=(0, 2),
    saved_tensors=(0, 1, 2),
    gradients={0: 0, 2: 1},
    check=spec.check_unpermute,
    fake=spec.fake_unpermute,
    fake_backward=spec.fake_unpermute_backward,
)


def moe_route(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where the rows of each token go when rows are sorted by expert, tokens in order within one.

    index  [tokens, choices] int: the experts of each token; `num_experts` and above is no expert
           (as expert parallelism marks them), whose rows come last

    Returns (position [tokens, choices] int64, offsets [num_experts] int32): the place of each row
    and where each expert's rows end, on index's device, which is not waited for.
    """
    if index.dim() != 2 or index.is_floating_point():
        raise ValueError(f"index: expected integers [tokens, choices], found {list(index.shape)}")
    ids, order = torch.sort(index.reshape(-1), stable=True)
    places = torch.arange(order.numel(), device=index.device)
    position = torch.empty_like(order).scatter_(0, order, places).view(index.shape)
    experts = torch.arange(num_experts, device=index.device, dtype=ids.dtype)
    return position, torch.searchsorted(ids, experts, right=True, out_int32=True)


def moe_permute(input: Tensor, position: Tensor, *, backend: str | None = None) -> Tensor:
    """Copies every token to the places of its rows: rows[position[t, j]] = input[t].

    input     [tokens, hidden], any float dtype
    position  [tokens, choices] int64, a permutation of all places, as `moe_route` makes it
    backend   forces one of fastllm's backends for this call

    Returns rows [tokens * choices, hidden], what `grouped_linear` takes. Raises ValueError or
    TypeError for arguments that do not fit, fastllm.UnsupportedError when `backend` cannot serve.
    """
    return moe_permute_op(input, position, backend=backend)


def moe_unpermute(
    rows: Tensor, position: Tensor, weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Adds up the rows of every token: output[t] = sum of weights[t, j] * rows[position[t, j]].

    rows      [tokens * choices, hidden], any float dtype; added up in float32, rounded once
    weights   [tokens, choices] or None (ones); its dtype may differ from that of rows

    Returns [tokens, hidden] in rows' dtype; the rest as for `moe_permute`.
    """
    return moe_unpermute_op(rows, position, weights, backend=backend)
