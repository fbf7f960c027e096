"""Products into memory that is there already, by the library that is fastest for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.core import memory
from fastllm.ops.matmul import products


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over several steps are kept in."""
    return torch.promote_types(dtype, torch.float32)


def write(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out = a b^T + bias, with a [M, K] and b [N, K]; out may be float32 for 16-bit a and b."""
    name = products.choose(a, b) if a.is_cpu else "torch"
    if name == "cpu":
        products.cpu(a, b, bias, out=out)
    elif name == "onednn" or out.dtype != a.dtype:
        out.copy_(products.PRODUCTS[name](a, b, bias))
    elif bias is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(bias, a, b.t(), out=out)


def add(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b^T."""
    name = products.choose(a, b) if a.is_cpu else "torch"
    if name == "cpu":
        products.cpu(a, b, out=out, accumulate=True)
    elif out.dtype == a.dtype:
        out.addmm_(a, b.t())
    else:
        out.add_(products.PRODUCTS[name](a, b))


def room(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized memory on the device of `like`; on the CPU from the pool if it is large."""
    dtype = dtype or like.dtype
    if like.is_cpu:
        return memory.empty(shape, dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


class Sum:
    """A gradient that is written, or summed up, in slices of its rows.

    With several steps a slice, 16-bit gradients are summed in float32.
    """

    def __init__(self, like: Tensor, steps: int, complete: bool = True) -> None:
        """`complete`: every slice will be written; else what is not stays 0."""
        self.dtype = like.dtype
        kind = wide(like.dtype) if steps > 1 else like.dtype
        self.total = room(like, like.shape, kind)
        if not complete:
            self.total.zero_()
        self.fresh = complete
        self.written: set[int] = set()

    def add(self, at: slice, a: Tensor, b: Tensor) -> None:
        """The slice grows by a b^T."""
        out = self.total[at]
        if self.fresh and at.start not in self.written:
            self.written.add(at.start)
            write(out, a, b)
        else:
            add(out, a, b)

    def result(self) -> Tensor:
        """In the dtype of what it is the gradient of."""
        return self.total.to(self.dtype)
