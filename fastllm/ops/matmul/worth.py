"""Which products are worth taking from torch on this CPU, where no table says so.

A product that torch computes at the machine's peak has nothing to win, and the way to one of ours
costs tens of microseconds.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.matmul import products

# multiplications, from which a product that torch is slow at pays for the way to ours
SMALL = 1 << 24
# weights, from which few rows do: such a product is bound by reading them
THIN, THIN_ROWS = 1 << 21, products.THIN_ROWS
# results of a gated pair, from which the passes and the memory that training saves pay
PASS = 1 << 20


def _at_peak() -> frozenset[torch.dtype]:
    """The dtypes in which torch's products leave nothing to win on this CPU."""
    fast, half, bf16, intel = products._machine()
    if not fast:
        return frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    known = {torch.float32: intel, torch.bfloat16: bf16, torch.float16: half, torch.float64: True}
    return frozenset(dtype for dtype, at_peak in known.items() if at_peak)


AT_PEAK = _at_peak()


def worth(rows: int, inner: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether a product [rows, inner] [inner, columns] is likely faster with us."""
    if dtype == torch.float64:
        return False
    if dtype not in AT_PEAK and rows * inner * columns >= SMALL:
        return True
    # one row of float32 runs at the speed of memory in MKL, too
    fewest = 1 + (dtype == torch.float32 and dtype in AT_PEAK)
    return inner * columns >= THIN and fewest <= rows <= THIN_ROWS


def _stock_first(training: bool, input: Tensor, weight: Tensor, *_: Any) -> bool:
    return input.is_cpu and not worth(*_sizes(input, weight), input.dtype)


def _stock_first_gated(training: bool, input: Tensor, weight: Tensor, *_: Any) -> bool:
    rows, columns = _rows(input), weight.shape[0]
    saves = training and rows * columns >= PASS
    return not saves and _stock_first(training, input, weight)


def _stock_first_matmul(training: bool, input: Tensor, other: Tensor) -> bool:
    if not input.is_cpu:
        return False
    columns = other.shape[-1] if other.dim() > 1 else 1
    return not worth(_rows(input), input.shape[-1], columns, input.dtype)


def _sizes(input: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return _rows(input), weight.shape[1], weight.shape[0]


def _rows(input: Tensor) -> int:
    return input.numel() // max(1, input.shape[-1])


STOCK_FIRST = {
    "linear": _stock_first,
    "linear_pre": _stock_first,
    "gated_linear": _stock_first_gated,
    "gated_linear_pre": _stock_first_gated,
    "matmul": _stock_first_matmul,
}
