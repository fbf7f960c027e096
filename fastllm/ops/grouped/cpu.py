"""grouped_linear on the CPU: the products of all experts in one parallel region of C++.

Each is cut into blocks that one thread computes, so that few rows an expert keep all threads busy;
nothing is gathered or concatenated, and a weight's gradient is written once.
"""

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty
from fastllm.ops.grouped.spec import segments
from fastllm.ops.matmul.products import CODES, readable, strides


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    end = _end(offsets, input)
    out = empty((input.shape[0], weights.shape[1]), input.dtype)
    _products(input, weights, offsets, out, bias)
    out[end:].zero_()
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
    dy, end = grad_output.to(input.dtype), _end(offsets, input)
    dx = dw = db = None
    if needs[0]:
        dx = empty(input.shape, input.dtype)
        _products(dy, weights.mT, offsets, dx)
        dx[end:].zero_()
    if needs[1]:
        dw = empty(weights.shape, weights.dtype)
        _products(dy.t(), input.t(), offsets, dw, inner=True)
    if needs[2] and bias is not None:
        db = empty(bias.shape, bias.dtype)
        for expert, (start, stop) in enumerate(segments(offsets, input.shape[0])):
            torch.sum(dy[start:stop], 0, out=db[expert])
    return dx, dw, db


def _end(offsets: Tensor, input: Tensor) -> int:
    """Where the last expert's rows end; ValueError unless the offsets fit the input."""
    pairs = segments(offsets, input.shape[0])
    return pairs[-1][1] if pairs else 0


def _products(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    inner: bool = False,
) -> None:
    """out[rows] = a[rows] b[e]^T + bias[e]; `inner`: out[e] = a[:, rows] b[:, rows]^T."""
    a, b, offsets = readable(a), readable(b), offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    if not out.numel():
        return
    _C.gemm_groups(
        CODES[a.dtype], a.shape[-2], b.shape[-2], a.shape[-1],
        a.data_ptr(), *strides(a)[:2], b.data_ptr(), *strides(b),
        0 if bias is None else bias.data_ptr(), out.data_ptr(),
        offsets.data_ptr(), offsets.shape[0], inner, torch.get_num_threads(),
    )  # fmt: skip


def _supports(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in CODES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    return None


BACKEND: Backend = Backend("cpu", grouped_linear, grouped_linear_backward, _supports)
