"""LLM.int8's split: columns of the input with large values in float, the others in int8.

Which columns those are is known in the call only: dispatcher ops hide it from torch.compile.
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops.matmul.reference import activate
from fastllm.ops.quant import layout
from fastllm.ops.quant_linear.spec import Terms

_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_NONE = torch.empty(0, dtype=torch.long)
_BLOCK = 1 << 24  # values of the weight that are floats at a time


def loud(x: Tensor, threshold: float) -> Tensor:
    """bool [K]: the columns of x [*, K] with a magnitude above `threshold`, or with NaN."""
    if not x.numel():
        return x.new_zeros(x.shape[-1], dtype=torch.bool)
    x = x.detach().reshape(-1, x.shape[-1])
    return ~(x.abs().amax(0).float() <= threshold)


def split(product: Callable[..., Tensor], input: Tensor, terms: Terms) -> Tensor | None:
    """product(input, *terms) with the loud columns in float, summed and rounded once.

    None where no column is loud: a token at a time that is the common case, and in a hurry.
    """
    if not input.numel():
        return None
    x = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    places = _places(x, terms.outlier_threshold)
    if not len(places):
        return None
    quiet = terms._replace(outlier_threshold=0.0)
    bias = None if terms.bias is None else terms.bias.float()
    rest = x.to(torch.float32, copy=True).index_fill_(1, places, 0.0)
    y = product(rest, *quiet._replace(bias=bias, activation=None))
    for some in places.split(max(1, _BLOCK // y.shape[1])) if y.numel() else ():
        y.addmm_(x.index_select(1, some).float(), weight_columns(terms, some).t())
    y = activate(y, terms.activation)
    return y.to(input.dtype).view(*input.shape[:-1], y.shape[1])


def _places(x: Tensor, threshold: float) -> Tensor:
    """The numbers of the loud columns."""
    if not x.is_cpu or x.dtype not in _BITS or x.stride(1) != 1:
        return loud(x, threshold).nonzero().flatten()
    rows, k = x.shape
    found = torch.empty(1 + k, dtype=torch.long)
    start = found.data_ptr()
    _C.qgemm_loud(
        x.data_ptr(), x.element_size(), rows, k, x.stride(0), _limit(threshold, x.dtype),
        start, torch.get_num_threads(),
    )  # fmt: skip
    count = ctypes.c_int64.from_address(start).value  # no tensor for one number
    return found.narrow(0, 1, count) if count else _NONE


@functools.lru_cache(maxsize=64)
def _limit(threshold: float, dtype: torch.dtype) -> int:
    """The bits of the largest number of `dtype` that is not above the threshold."""
    exact = torch.tensor(threshold)
    near = exact.to(dtype)
    return int(near.view(_BITS[dtype])) - int(near.float() > exact)


def weight_columns(terms: Terms, places: Tensor) -> Tensor:
    """float32 [N, C]: what the codes of these columns stand for, int8 and int4."""
    codes, scales, zeros, code, group = terms.weight
    if layout.packed(code):
        bytes_ = codes.index_select(1, places >> 1).int()
        values = (bytes_ >> (places % 2 * 4).int() & 15).float()
        if zeros is None or not zeros.numel():
            values -= 8.0
        else:
            values -= _each(zeros.float(), len(codes), places, group)
    else:
        values = codes.index_select(1, places).float()
    return values.mul_(_each(scales.float(), len(codes), places, group))


def _each(scales: Tensor, rows: int, places: Tensor, group: int) -> Tensor:
    """The scales of these columns: broadcasts to [rows, C]."""
    if group in (0, -1):
        return scales
    picked = scales.index_select(1, places // abs(group))
    return picked if group > 0 else picked.repeat_interleave(-group, 0)[:rows]
