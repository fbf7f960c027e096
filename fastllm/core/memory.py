"""Memory for large CPU outputs: reused blocks, so that a result does not pay page faults again.

glibc returns large blocks to the system as soon as they are freed; mapping and zeroing the next one
takes several times as long as a norm. Here a block that dies waits for the next tensor of about its
size. What lies idle is bounded by FASTLLM_POOL_BYTES (default: an eighth of the memory that this
process may use; 0: no pool at all). Blocks in use are ordinary memory of ordinary tensors, with one
limit that tensors from numpy have, too: their storage cannot grow (`resize_` to more elements
raises).
"""

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm import _C

POOL_FROM = 8 << 20
"""Outputs of this many bytes or more come from the pool."""

# DLPack's type code and width
_TYPES = {
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.float64: (2, 64),
    torch.int8: (0, 8),
    torch.uint8: (1, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
}


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor of uninitialized memory, from the pool if it is large."""
    kind = _TYPES.get(dtype)
    if kind is None or not _limit or math.prod(shape) * kind[1] < 8 * POOL_FROM:
        return torch.empty(shape, dtype=dtype)
    return _from_dlpack(_lend(*kind, shape))


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor of the shape and dtype of `tensor`, from the pool if it is large."""
    if tensor.nbytes >= POOL_FROM and _limit:
        kind = _TYPES.get(tensor.dtype)
        if kind is not None:
            return _from_dlpack(_lend(*kind, tensor.shape))
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, device="cpu")


def adjacent(x: Tensor) -> Tensor:
    """`x` with neighbours along the last dimension: itself where they are, whatever else."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty_cache() -> None:
    """Gives the pool's idle blocks back to the system."""
    _C.pool_empty()


def memory_stats() -> dict[str, int]:
    """The pool's counters.

    limit                    most bytes that may lie idle; 0: the pool is off
    idle_bytes, idle_blocks  held for the next tensors
    live_bytes, live_blocks  lent to tensors that are alive
    reused, allocated        requests so far that found an idle block, and that needed a new one
    """
    return _C.pool_stats()


def set_limit(limit: int) -> int:
    """Bounds the bytes that may lie idle and frees what is above; 0 turns the pool off.

    Returns the limit that was in force.
    """
    global _limit
    if limit < 0:
        raise ValueError(f"limit: expected 0 or more bytes, found {limit}")
    before, _limit = _limit, int(limit)
    _C.pool_set_limit(_limit)
    return before


def _usable_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if less."""
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        sizes.append(4 << 30)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                sizes.append(int(file.read()))
        except (OSError, ValueError):
            continue
    return min(sizes)


def _first_limit() -> int:
    wish = os.environ.get("FASTLLM_POOL_BYTES", "").strip()
    if not wish:
        return _usable_memory() // 8
    if not wish.isdigit():
        raise ValueError(f"FASTLLM_POOL_BYTES: expected a number of bytes, found {wish!r}")
    return int(wish)


_lend = _C.pool_empty_tensor
_from_dlpack = torch.from_dlpack
_limit = 0
set_limit(_first_limit())
