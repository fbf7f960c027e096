"""softmax and log_softmax: one read, one write, forward and backward, along any dimension."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import Op, smaller
from fastllm.ops.softmax import cpu, reference, spec, stock, triton
from fastllm.ops.softmax.cases import cases


def _register(name: str) -> Op:
    return define(
        name,
        (cpu.BACKENDS[name], triton.BACKENDS[name], stock.BACKENDS[name]),
        reference,
        family="softmax",
        schema=spec.SCHEMA,
        tensors=(0,),
        saved=lambda args, out: (out, args[1]),
        saved_tensors=(0,),
        gradients={0: 0},
        check=spec.check,
        fake=spec.fake,
        fake_backward=lambda output, dim: (spec.fake(output, dim),),
        cost=spec.cost,
        cases=cases(),
        autocast={"cuda": torch.float32},
        stock_first=smaller(1 << 12, 1 << 18),
    )


softmax_op = _register("softmax")
log_softmax_op = _register("log_softmax")


def softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`, as torch.nn.functional.softmax; rows of any length.

    input of any shape and float dtype, computed in float32 and rounded once; `dtype` converts it
    first. Returns input's shape. Raises ValueError or TypeError for arguments that do not fit.
    """
    return _call(softmax_op, input, dim, dtype, backend)


def log_softmax(
    input: Tensor,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x - log(sum(exp(x))) along `dim`, as torch.nn.functional.log_softmax; see `softmax`."""
    return _call(log_softmax_op, input, dim, dtype, backend)


def _call(op: Op, input: Any, dim: int | None, dtype: torch.dtype | None, backend: Any) -> Tensor:
    if dtype is not None and isinstance(input, Tensor):
        input = input.to(dtype)
    if dim is None:  # torch's old rule
        dim = 0 if input.dim() in (0, 1, 3) else 1
    return op(input, dim, backend=backend)
