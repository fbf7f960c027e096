"""Local parts of distributed tensors: an optimizer's step needs no communication."""

import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from fastllm.optim.work import Work

_PLAIN = {Tensor, Parameter}


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor; does not import torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(work: "Work") -> "Work":
    """`work` with the local shard in place of each DTensor."""
    if set(map(type, work.params)) <= _PLAIN and set(map(type, work.grads)) <= _PLAIN:
        return work
    grads = [
        _as_placed(p, g) if is_dtensor(p) else g
        for p, g in zip(work.params, work.grads, strict=True)
    ]
    return work._replace(
        params=[shard(p) for p in work.params],
        grads=[shard(g) for g in grads],
        states=[[shard(s) for s in each] for each in work.states],
        scales=[[shard(s) for s in each] for each in work.scales],
        masters=work.masters and [shard(m) for m in work.masters],
    )


def shard(tensor: Any) -> Any:
    """The local tensor of a DTensor, anything else itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        part = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part


def zeros_like_shard(param: Any, dtype: torch.dtype) -> Any:
    """Zeros of any dtype, placed as the DTensor `param` is."""
    mine = torch.zeros_like(shard(param), dtype=torch.uint8).view(dtype)
    return type(param).from_local(
        mine, param.device_mesh, param.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def scales_like_shard(param: Any, scales_of: Callable[[int], int]) -> Any:
    """Zeros for the scales of each shard's blocks, one after the other.

    Every shard has as many as the largest one needs. A checkpoint of them is for as many shards.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, sizes = param.device_mesh, list(param.shape)
    for dim, placement in enumerate(param.placements):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // mesh.size(dim))
    mine = torch.zeros(scales_of(math.prod(sizes)), device=shard(param).device)
    places = [Shard(0) if p.is_shard() else Replicate() for p in param.placements]
    return type(param).from_local(mine, mesh, places, run_check=False)


def _as_placed(param: Any, grad: Any) -> Any:
    """The gradient placed as its parameter is."""
    if is_dtensor(grad) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad
