"""Several ranks: rank 0 decides, the others follow, so that all run the same kernels."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fastllm.core.tuner import facts, table

T = TypeVar("T")


def ranks() -> int:
    """How many processes train together."""
    ready = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if ready else 1


def decided_by_first(device: str, decide: Callable[[], T]) -> T:
    """decide() on rank 0, its result and rank 0's table on every rank; a collective call.

    What rank 0 raises is raised on every rank: nobody is left waiting. A rank on another kind of
    device keeps the result only, with a warning: figures do not carry over.
    """
    if ranks() == 1:
        return decide()
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            result = decide()
            known = table.layers(device)
            box[0] = ("found", result, facts.facts(device), known.user, known.process)
        except Exception as error:
            box[0] = ("failed", f"{type(error).__name__}: {error}")
    on = torch.device(device) if dist.get_backend() == "nccl" else None
    dist.broadcast_object_list(box, src=0, device=on)
    if box[0][0] == "failed":
        raise RuntimeError(f"rank 0 could not tune: {box[0][1]}")
    _, result, theirs, user, process = box[0]
    if dist.get_rank() != 0:
        if theirs == facts.facts(device):
            table.adopt(device, user, process)
        else:
            warnings.warn(
                f"fastllm: {device} of rank {dist.get_rank()} is not like rank 0's; "
                "what rank 0 measured is not used on it",
                RuntimeWarning,
                stacklevel=3,
            )
    return result
