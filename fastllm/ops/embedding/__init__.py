"""embedding: torch's, with a backward that is deterministic and sums in float32."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.ops.embedding import cpu, reference, spec, stock, triton
from fastllm.ops.embedding.cases import cases


def _saved(args: tuple, output: Any) -> tuple:
    """The indices and the sizes of weight, which itself may change before backward."""
    weight, input, padding_idx, scale_grad_by_freq = args
    return input, *weight.shape, weight.dtype, padding_idx, scale_grad_by_freq


def _forward_args(saved: tuple) -> tuple:
    """What supports() looks at: the indices' device, the weight's dtype."""
    input, _, _, dtype, *rest = saved
    return (input.new_empty((0, 0), dtype=dtype), input, *rest)


def _stock_first(training: bool, weight: Tensor, input: Tensor, *_: Any) -> bool:
    """In forward torch reads as fast what is too much for one thread and too little for a pool."""
    return not training and input.is_cpu and 1 << 17 <= input.numel() * weight.shape[1] < 1 << 19


embedding_op = define(
    "embedding",
    (cpu.BACKEND, triton.BACKEND, stock.BACKEND),
    reference,
    family="embedding",
    schema=spec.SCHEMA,
    tensors=(0, 1),
    saved=_saved,
    saved_tensors=(0,),
    gradients={0: 0},
    forward_args=_forward_args,
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
    stock_first=_stock_first,
    call=lambda weight, input, padding, by_freq: functools.partial(
        embedding, input, weight, padding if padding >= 0 else None, scale_grad_by_freq=by_freq
    ),
)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Rows of weight, as torch.nn.functional.embedding.

    input               indices, int32 or int64, any shape
    weight              [V, N], any float dtype
    padding_idx         this row gets no gradient; negative: counted from the end
    max_norm            rows that are read and longer than this (in the norm_type) are first scaled
                        down, in place, as torch does
    scale_grad_by_freq  gradients are divided by how often their index comes
    sparse              a sparse gradient: served by torch itself
    backend             forces one of fastllm's backends for this call

    Returns [*input.shape, N]. Backward adds up the rows of each index in their order in float32:
    the same result whatever the number of threads. Raises IndexError for an index out of range (on
    the CPU), TypeError or ValueError for arguments that do not fit, fastllm.UnsupportedError when
    `backend` cannot serve the call.
    """
    if sparse:
        if backend not in (None, "auto", "torch"):
            raise ValueError(f"sparse: expected backend None or 'torch', found {backend!r}")
        return F.embedding(
            input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        )
    if padding_idx is None:
        padding_idx = -1
    else:
        rows = weight.shape[0]
        if not -rows <= padding_idx < rows:
            raise ValueError(f"padding_idx: expected -{rows} to {rows - 1}, found {padding_idx}")
        padding_idx %= rows
    if max_norm is not None:
        spec.check(weight, input, padding_idx, scale_grad_by_freq)
        with torch.no_grad():
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)
    return embedding_op(weight, input, padding_idx, scale_grad_by_freq, backend=backend)
