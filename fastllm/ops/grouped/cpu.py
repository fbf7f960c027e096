"""grouped_linear on the CPU: one product an expert, each written where it belongs.

Nothing is gathered, concatenated or allocated an expert, and a weight's gradient is written once
(the loop that models write adds up a gradient of all experts for each of them).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.memory import empty
from fastllm.ops.grouped.spec import segments

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    out = empty((input.shape[0], weights.shape[1]), input.dtype)
    for expert, rows in _rows(offsets, out):
        w = weights[expert].t()
        if bias is None:
            torch.mm(input[rows], w, out=out[rows])
        else:
            torch.addmm(bias[expert], input[rows], w, out=out[rows])
    return out


def grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """(grad_input, grad_weights, grad_bias), None where not needed."""
    dy = grad_output.to(input.dtype)
    dx = empty(input.shape, input.dtype) if needs[0] else None
    dw = empty(weights.shape, weights.dtype) if needs[1] else None
    db = empty(bias.shape, bias.dtype) if needs[2] and bias is not None else None
    if dx is not None:
        for expert, rows in _rows(offsets, dx):
            torch.mm(dy[rows], weights[expert], out=dx[rows])
    if dw is not None:
        for expert, (start, end) in enumerate(segments(offsets, input.shape[0])):
            if start == end:
                dw[expert].zero_()
            else:
                torch.mm(dy[start:end].t(), input[start:end], out=dw[expert])
    if db is not None:
        for expert, (start, end) in enumerate(segments(offsets, input.shape[0])):
            torch.sum(dy[start:end], 0, out=db[expert])
    return dx, dw, db


def _rows(offsets: Tensor, out: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of each expert that has some; rows of `out` that no one has are zeroed."""
    end = 0
    for expert, (start, end) in enumerate(segments(offsets, out.shape[0])):
        if end > start:
            yield expert, slice(start, end)
    out[end:].zero_()


def _supports(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in _DTYPES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    return None


BACKEND: Backend = Backend("cpu", grouped_linear, grouped_linear_backward, _supports)
