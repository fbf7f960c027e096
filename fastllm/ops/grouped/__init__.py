"""grouped_linear: the linear layers of a mixture of experts in one call, forward and backward."""

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.dispatch import define
from fastllm.ops.grouped import cpu, reference, spec, stock, triton
from fastllm.ops.grouped.cases import cases

grouped_linear_op = define(
    "grouped_linear",
    (cpu.BACKEND, triton.BACKEND, stock.BACKEND),
    reference,
    family="grouped",
    schema=spec.SCHEMA,
    tensors=(0, 1, 3),  # offsets are integers: spec.check looks at them
    saved_tensors=(0, 1, 2, 3),
    gradients={0: 0, 1: 1, 3: 2},
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
    autocast={"cpu": torch.bfloat16, "cuda": torch.float16},
)


def grouped_linear(
    input: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One linear layer an expert, over rows that are sorted by expert: y = x W[e]^T + b[e].

    input     [tokens, K], the rows of expert 0 first, then those of expert 1, ...
    weights   [E, N, K], input's dtype; a transposed view costs nothing
    offsets   [E] int32: where the rows of each expert end, on input's device (it is not read by the
              host on a GPU, so there values that decrease or overrun are clamped, not reported)
    bias      [E, N] or None
    backend   forces one of fastllm's backends for this call

    Returns [tokens, N]. Rows behind the last end are zero, and so are their gradients and those of
    an expert without rows. Raises ValueError or TypeError for arguments that do not fit,
    fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    kind = casting(input)
    if kind is not None:
        with torch.autocast(kind, enabled=False):
            return grouped_linear(*cast(kind, input, weights, offsets, bias), backend=backend)
    return grouped_linear_op(input, weights, offsets, bias, backend=backend)
