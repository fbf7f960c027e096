"""Local parts of distributed tensors: an optimizer's step needs no communication."""

import sys
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


def _as_placed(param: Any, grad: Any) -> Any:
    """The gradient placed as its parameter is."""
    if is_dtensor(grad) and grad.placements != param.placements:
        return grad.redistribute(placements=param.placements)
    return grad
