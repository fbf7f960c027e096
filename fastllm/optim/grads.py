"""Gradients before the step: their total norm, clipping, accumulation in float32."""

import math
import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fastllm import _C
from fastllm.optim import cpu  # noqa: F401  (gives the extension what it needs of torch)
from fastllm.optim.local import is_dtensor, shard

_PLAIN = {Tensor, Parameter}


@torch.no_grad()
def norm_of(grads: list[Any]) -> tuple[float, float]:
    """(2-norm of all gradients as one vector, largest magnitude), in one pass.

    The magnitude is inf or NaN when an element is. Shards of a DTensor are summed over its mesh.
    """
    if set(map(type, grads)) <= _PLAIN:
        squares, largest = _measure(grads)
        return math.sqrt(squares), largest
    plain = [g for g in grads if not is_dtensor(g)]
    squares, largest = _measure(plain)
    meshes: dict[Any, list[Any]] = {}
    for g in grads:
        if is_dtensor(g):
            meshes.setdefault((g.device_mesh, g.placements), []).append(g)
    for (mesh, placements), group in meshes.items():
        more, top = _measure_shards(mesh, placements, group)
        squares, largest = squares + more, _larger(largest, top)
    return math.sqrt(squares), largest


def _measure_shards(mesh: Any, placements: Any, group: list[Any]) -> tuple[float, float]:
    """(sum of squares, largest magnitude) of DTensors that are placed alike."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if any(p.is_partial() for p in placements):
        placements = [Replicate() if p.is_partial() else p for p in placements]
        group = [g.redistribute(placements=placements) for g in group]
    squares, largest = _measure([shard(g) for g in group])
    here = torch.tensor([squares], dtype=torch.float64, device=shard(group[0]).device)
    sums = [Partial() if p.is_shard() else Replicate() for p in placements]
    total = DTensor.from_local(here, mesh, sums, run_check=False).full_tensor()
    # a sum tells of inf and NaN, which is all that the magnitude is for
    bad = here.new_tensor([0.0 if math.isfinite(largest) else math.nan])
    bad = DTensor.from_local(bad, mesh, sums, run_check=False).full_tensor()
    return total.item(), math.nan if bad.isnan().item() else largest


def _measure(grads: list[Tensor]) -> tuple[float, float]:
    """(sum of squares, largest magnitude): the kernel where it can, plain torch elsewhere."""
    if not grads:
        return 0.0, 0.0
    if any(map(Tensor.is_neg, grads)):
        grads = [g.resolve_neg() for g in grads]
    found = _C.optim_measure(grads, torch.get_num_threads())
    if isinstance(found, tuple):
        return found
    odd = {i: _odd(grads[i]) for i in found}
    rest = [g for i, g in enumerate(grads) if i not in odd]
    squares, largest = _measure(rest)
    for more, top in odd.values():
        squares, largest = squares + more, _larger(largest, top)
    return squares, largest


def _odd(grad: Tensor) -> tuple[float, float]:
    if grad.is_sparse:
        grad = grad.coalesce()._values()
    if grad.numel() == 0:
        return 0.0, 0.0
    if grad.is_cpu and grad.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _measure([grad.contiguous()])
    size = grad.detach().abs().double()
    return size.square().sum().item(), size.max().item()


def _larger(a: float, b: float) -> float:
    """The larger one; NaN when one is."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ in one pass over the gradients, and a second to scale them.

    The second is left out where nothing is above `max_norm`. Other norms than 2, and gradients
    that are not on the CPU, are torch's. Returns the total norm, a scalar tensor; for sharded
    DTensors it is the whole norm, a plain tensor. Raises RuntimeError for a norm that is not finite
    if `error_if_nonfinite`.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    elif isinstance(parameters, types.GeneratorType):
        parameters = list(parameters)
        if not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2
            )
    params = list(parameters)
    grads = [p.grad for p in params if p.grad is not None]
    if float(norm_type) != 2.0 or not grads or not all(g.is_cpu for g in grads):
        return torch.nn.utils.clip_grad_norm_(
            params, max_norm, norm_type, error_if_nonfinite, foreach
        )
    norm, _ = norm_of(grads)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, "
            f"found {norm}: it cannot be clipped to. error_if_nonfinite=False scales all the same"
        )
    factor = float(max_norm) / (norm + 1e-6)
    if not factor > 1.0:
        scale_(grads, factor)
    dtype = grads[0].dtype if grads[0].dtype == torch.float64 else torch.float32
    same = {g.dtype for g in grads}
    return torch.tensor(norm, dtype=same.pop() if len(same) == 1 else dtype)


@torch.no_grad()
def scale_(grads: list[Tensor], factor: float) -> None:
    """Multiplies gradients in place."""
    local = [shard(g) for g in grads]
    odd = _C.optim_scale(local, factor, torch.get_num_threads())
    if odd is None:
        done = local
    else:
        for i in odd:
            local[i].mul_(factor)
        done = [g for i, g in enumerate(local) if i not in set(odd)]
        if done and _C.optim_scale(done, factor, torch.get_num_threads()) is not None:
            raise RuntimeError("gradients changed while they were scaled")
    torch.autograd.graph.increment_version(done)


def accumulate_grad(model: Module, dtype: torch.dtype = torch.float32) -> Module:
    """Gradients of `model` are kept and summed over micro-batches in `dtype`.

    For models in bfloat16 or float16, whose gradients would lose small contributions: the
    optimizers here take float32 gradients of low-precision parameters. Sets `Parameter.grad_dtype`
    and returns the model. Raises TypeError for a dtype that is not floating, ValueError when a
    gradient of another dtype is there already.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, found {dtype}")
    params = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    for name, p in model.named_parameters():
        if p.grad is not None and p.grad.dtype != dtype:
            raise ValueError(f"{name}.grad: expected None or {dtype}, found {p.grad.dtype}")
    for p in params:
        p.grad_dtype = dtype  # type: ignore[attr-defined]
    return model
