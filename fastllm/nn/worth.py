"""Where fastllm's products are worth taking instead of torch's: measured, never slower.

A product that torch computes at the machine's peak has nothing to win, and the way to one of ours
costs tens of microseconds; then modules call torch, and only what is around the products is fused.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.op import OPS
from fastllm.core.tuner import table
from fastllm.core.tuner.routes import FORWARD, TRAINING, Routes, call_key, device_of, lookup
from fastllm.ops.matmul import products

# multiplications, from which a product that torch is slow at pays for the way to ours
SMALL = 1 << 24
# weights, from which few rows do: such a product is bound by reading them
THIN, THIN_ROWS = 1 << 21, 4
# results, from which a pass over memory that is saved pays for the way to the kernel
PASS = 1 << 18


def _at_peak() -> frozenset[torch.dtype]:
    """The dtypes in which torch's products leave nothing to win on this CPU."""
    fast, half, bf16, intel = products._machine()
    if not fast:
        return frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
    known = {torch.float32: intel, torch.bfloat16: bf16, torch.float16: half, torch.float64: True}
    return frozenset(dtype for dtype, at_peak in known.items() if at_peak)


AT_PEAK = _at_peak()
# fewest thin rows that win: one row of float32 runs at the speed of memory in MKL, too
_THIN_FROM = 2 if torch.float32 in AT_PEAK else 1
_MOST = 4096
_measured: dict[int, bool | None] = {}
table.listen(_measured.clear)


def worth(input: Any, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether fastllm's linear is faster than torch's: as measured, else by what is known of CPUs.

    False for what only torch takes: nested tensors, the proxies of torch.fx, mixed dtypes.
    """
    if not isinstance(input, Tensor) or input.is_nested:
        return False
    kind, dtype = input.device.type, input.dtype
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != weight.dtype:
        return False
    if not torch.compiler.is_compiling() and OPS["linear"].routes is not None:
        answer = measured(input, weight, bias)
        if answer is not None:
            return answer
    if kind != "cpu":
        return False
    size, weights = input.numel(), weight.numel()
    if dtype not in AT_PEAK:
        if size * weight.shape[0] >= SMALL:
            return True
    elif dtype == torch.float64:
        return False
    if weights < THIN or size > THIN_ROWS * input.shape[-1]:
        return False
    return dtype != torch.float32 or size >= _THIN_FROM * input.shape[-1]


def measured(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool | None:
    """What the tuner's table says of this call; None: nothing."""
    op, args = OPS["linear"], (input, weight, bias, None, None)
    key = call_key(args, None)
    if key is None:
        return None
    if not isinstance(op.routes, Routes) and op.routes is not None:
        op.routes.find(args)  # somebody notes the calls, to tune them
    if key not in _measured:
        if op.routes is not None:
            op.routes.find(args)  # it reads the tables and, if asked to, measures
        device = device_of(op, args)
        name = None
        if device is not None:
            name = lookup(op, args, device, TRAINING if key & 1 else FORWARD)
        if len(_measured) >= _MOST:
            _measured.clear()
        _measured[key] = None if name is None else name != "torch"
    return _measured[key]


def worth_a_pass(input: Any, width: int) -> bool:
    """Whether fusing what is around a product with `width` columns pays."""
    if not isinstance(input, Tensor) or input.is_nested:
        return False
    if torch.compiler.is_compiling():
        return True
    return input.numel() * width >= PASS * input.shape[-1]
