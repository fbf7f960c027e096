"""Weights kept in the layout of our kernels beside the tensor, for who multiplies by them often.

A pack belongs to a tensor object and is no part of it: state_dict, .to() and pickling see nothing.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.tuner import table

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Pack:
    """The packed copy of one weight, and what the weight was when it was made."""

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: PACKS.pop(key, None))
        self.state: Any = None
        self.data = torch.empty(0, dtype=torch.uint8)

    def pointer(self) -> int:
        """The packed bytes, made again if the weight has changed since; 0: it cannot be packed."""
        weight = self.weight()
        if weight is None or _why_not(weight) is not None:
            return 0
        state = _state(weight)
        if state != self.state:
            n, k = weight.shape
            code = _CODES[weight.dtype]
            size = _C.gemm_packed_bytes(code, n, k)
            self.data = torch.empty(size + 64, dtype=torch.uint8)
            _C.gemm_pack(
                code, weight.data_ptr(), k, 1, n, k, self._aligned(), torch.get_num_threads()
            )
            self.state = state
        return self._aligned()

    def _aligned(self) -> int:
        return -(-self.data.data_ptr() // 64) * 64


PACKS: dict[int, Pack] = {}


def prepack(weight: Tensor) -> None:
    """Keeps `weight` [N, K] packed for products of more than a few rows; costs its size again.

    In-place writes, `.to()` and a change of level are noticed (by version counter, address, dtype)
    and the pack is made again by the next product. A write through `weight.data` is not counted by
    torch: call `prepack` again after one. Raises ValueError for a tensor that cannot be packed.
    """
    reason = _why_not(weight)
    if reason is not None:
        raise ValueError(
            f"weight: expected a contiguous CPU matrix that is tracked, found {reason}"
        )
    first = not PACKS
    PACKS[id(weight)] = Pack(weight)
    if first:
        table.announce()  # until now no call had to ask for packs


def unpack(weight: Tensor) -> None:
    """Drops the packed copy of `weight`, if there is one."""
    PACKS.pop(id(weight), None)


def pointer(weight: Tensor) -> int:
    """The address of the up-to-date pack of this very tensor, or 0."""
    pack = PACKS.get(id(weight)) if PACKS else None
    return 0 if pack is None or pack.weight() is not weight else pack.pointer()


def _state(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight._version, weight.dtype, tuple(weight.shape), _C.isa()


def _why_not(weight: Tensor) -> str | None:
    if not isinstance(weight, Tensor) or weight.is_inference():
        return "an inference tensor, whose writes are not counted"
    if not weight.is_cpu or weight.dim() != 2 or weight.dtype not in _CODES:
        return f"{weight.dtype} {list(weight.shape)} on {weight.device}"
    return None if weight.is_contiguous() and weight.numel() else "one that is strided or empty"
