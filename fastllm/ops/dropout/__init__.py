"""dropout_add: dropout and the residual sum after it in one pass, without a stored mask."""

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.ops.attention.random import factor
from fastllm.ops.dropout import cpu, reference, spec, triton
from fastllm.ops.dropout.cases import cases


def _stock(input: Tensor, residual: Tensor, seed: Tensor, p: float) -> Tensor:
    """As F.dropout and a sum round, with this op's mask."""
    scale = torch.where(reference.kept(seed, input.shape, p), factor(p), 0.0)
    return residual + input * scale.to(input.dtype)


dropout_add_op = define(
    "dropout_add",
    (cpu.BACKEND, triton.BACKEND, Backend("torch", _stock)),
    reference,
    family="dropout",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2),
    saved=lambda args, out: (args[2], list(args[0].shape), args[0].dtype, args[3]),
    saved_tensors=(0,),
    gradients={0: 0, 1: 1},
    forward_args=lambda saved: (
        saved[0].new_empty((0,), dtype=saved[2]), saved[0].new_empty((0,), dtype=saved[2]),
        saved[0], saved[3],
    ),
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
)  # fmt: skip


def dropout_add(
    input: Tensor,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(input, p) (Srivastava et al. 2014) in one pass, forward and backward.

    input, residual  of one shape, any float dtype; computed in float32, rounded once to the dtype
                     of their sum
    p                share of input's elements that become 0; the others are divided by 1 - p
    training         False: residual + input
    seed             int64 [1] on input's device; None: drawn from torch's generator of the device,
                     so that checkpointing and manual_seed repeat it. The mask follows from it and
                     an element's place alone, the same on every backend; backward makes it again

    Raises ValueError or TypeError for arguments that do not fit.
    """
    spec.check_probability(p)
    if not training or p == 0.0:
        return residual + input
    dtype = torch.promote_types(input.dtype, residual.dtype)
    if seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=input.device)
    return dropout_add_op(  # type: ignore[no-any-return]
        input.to(dtype), residual.to(dtype), seed, float(p), backend=backend
    )
