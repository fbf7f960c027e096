"""sparse_linear: a linear layer that keeps two of every four weights, forward and backward."""

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.dispatch import define
from fastllm.ops.sparse_linear import cpu, reference, spec, stock, triton
from fastllm.ops.sparse_linear.cases import cases
from fastllm.ops.sparse_linear.layout import expand as expand
from fastllm.ops.sparse_linear.layout import pack as pack
from fastllm.ops.sparse_linear.layout import pick as pick

sparse_linear_op = define(
    "sparse_linear",
    (cpu.BACKEND, triton.BACKEND, stock.BACKEND),
    reference,
    family="sparse",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3, 4),
    saved_tensors=(0, 1, 2, 3, 4),
    gradients={0: 0, 1: 1, 4: 2},
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
    autocast_composite=("cpu", "cuda"),
)


def sparse_linear(
    input: Tensor,
    values: Tensor,
    kept: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activations: str | int = "float",
    backend: str | None = None,
) -> Tensor:
    """input W^T + bias, where W [N, K] keeps two of every four neighbours along a row.

    input        [*, K] float32, bfloat16, float16 (float64 in plain torch)
    values       [N, 2 ceil(K / 4)] the kept weights, in order: input's dtype, or int8
    kept         [N, ceil(K / 8)] uint8: bit j of byte i is set where element 8 i + j is kept.
                 `fastllm.ops.sparse_linear.pack` makes both of a
                 pruned weight
    scales       [N] float32, with int8 values only: what each row is multiplied with
    bias         [N] of input's dtype, or None; added in float32
    activations  "float": input as it is. "dynamic" (int8 values): each token rounded to int8 with
                 the scale max |x| / 127
    backend      forces one of fastllm's backends for this call

    Returns [*, N] in input's dtype. Input, bias and values have gradients, those of values at what
    is kept only, so that training keeps the zeros; int8 values have none, and gradients pass the
    rounding of activations straight through. Raises ValueError or TypeError for arguments that do
    not fit, fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    mode = spec.ACTIVATIONS.get(activations, -1) if isinstance(activations, str) else activations
    kind = casting(input)
    if kind is not None:
        if values.dtype == torch.int8:
            input, bias = cast(kind, input, bias)
        else:
            input, values, bias = cast(kind, input, values, bias)
        with torch.autocast(kind, enabled=False):
            return sparse_linear_op(input, values, kept, scales, bias, mode, backend=backend)
    return sparse_linear_op(input, values, kept, scales, bias, mode, backend=backend)
