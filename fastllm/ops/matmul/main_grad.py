"""linear whose weight gradient is added to a float32 buffer of the caller's, in its backward."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.backend import Backend
from fastllm.core.op import describe
from fastllm.ops.matmul import linear_op, products, triton


@torch.compiler.disable
def linear_main_grad(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    main_grad: Tensor,
    bias_main_grad: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """linear whose backward adds dW = dY^T X to `main_grad` and leaves weight.grad alone.

    Gradients of many small batches are then summed in float32 whatever dtype the weight has, in one
    pass less (the `main_grad` of Megatron-LM; Shoeybi et al. 2019).

    input, weight, bias  as for `linear`
    main_grad            [N, K] float32, contiguous, on weight's device; float64 for float64
    bias_main_grad       [N], the same for bias; None: bias.grad is made as always

    Returns [*, N]. Not differentiable twice; under torch.compile the graph is broken here. Raises
    ValueError or TypeError for arguments that do not fit.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor, found {type(weight).__name__}")
    _check("main_grad", main_grad, weight)
    if bias_main_grad is not None:
        if bias is None:
            raise ValueError("bias_main_grad: expected None without a bias, found a tensor")
        _check("bias_main_grad", bias_main_grad, bias)
    kind = casting(input)
    args = (input, weight, bias) if kind is None else cast(kind, input, weight, bias)
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return linear_op(*args, None, None, backend=backend)
    with torch.autocast(input.device.type, enabled=False):
        return _Accumulating.apply(*args, main_grad, bias_main_grad, backend)


def _check(name: str, buffer: Any, like: Tensor) -> None:
    kind = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(buffer, Tensor):
        raise TypeError(f"{name}: expected a Tensor, found {type(buffer).__name__}")
    fits = buffer.shape == like.shape and buffer.dtype == kind and buffer.device == like.device
    if not fits or not buffer.is_contiguous():
        raise ValueError(
            f"{name}: expected contiguous {kind} of shape {list(like.shape)} on {like.device}, "
            f"found {describe(buffer)}"
        )


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, *rest: Any) -> Tensor:
        ctx.buffers, ctx.backend = rest[:2], rest[2]
        ctx.save_for_backward(x, weight, bias)
        out: Tensor = linear_op(x, weight, bias, None, None, backend=rest[2])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, bias = ctx.saved_tensors
        total, bias_total = ctx.buffers
        run = linear_op.select((x, weight, bias, None, None), ctx.backend, training=True)
        wanted = ctx.needs_input_grad[2] and bias_total is None
        needs = (ctx.needs_input_grad[0], False, wanted, False)
        made = run.backward or linear_op.reference_backward
        dx, _, db, _ = made(grad, x, weight, bias, None, needs)
        dy, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        if dy.shape[0]:
            add_product(total, dy.t(), x.t(), run)
            if bias_total is not None:
                bias_total += dy.sum(0, dtype=bias_total.dtype)
        return dx, None, db, None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor, run: Backend) -> None:
    """total += a b^T without rounding to 16 bits on the way, where `run`'s library can."""
    if run.name == "triton":
        triton.add_product(total, a, b)
    elif (
        a.is_cpu
        and a.dtype in products.CODES
        and (a.dtype != torch.float32 or products.choose(a, b) == "cpu")
    ):
        products.cpu(a, b, out=total, accumulate=True)
    else:
        total.addmm_(a.to(total.dtype), b.t().to(total.dtype))
        return
    torch.autograd.graph.increment_version(total)
