"""linear_cross_entropy in plain torch: any float dtype, differentiable, in float64 the oracle."""

from typing import Any

import torch
from torch import Tensor

from fastllm.ops.linear_loss.spec import LinearOptions, lse_shape
from fastllm.ops.loss import reference
from fastllm.ops.loss.reference import wide


def logits_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Tensor:
    """input weight^T + low up^T + bias, in at least float32."""
    logits = wide(input) @ wide(weight).t()
    if low is not None and up is not None:
        logits = logits + wide(low) @ wide(up).t()
    return logits if bias is None else logits + wide(bias)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """cross_entropy(input @ weight^T + low @ up^T + bias, target); exact whatever skip_below is."""
    o = LinearOptions(*options)
    logits = logits_of(input, weight, bias, low, up)
    loss, lse = reference.cross_entropy(logits, target, class_weight, *o[:6])
    return loss, lse.expand(lse_shape(input, weight, o)).contiguous()


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    lse: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dX = dL W, dW = dL^T X, db = sum of dL, with dL the gradient of the logits; so low and up."""
    o, needs = LinearOptions(*rest[:-1]), rest[-1]
    logits = logits_of(input, weight, bias, low, up)
    (d,) = reference.cross_entropy_backward(
        grad_loss, logits, target, class_weight, lse, None, *o[:6], (True,)
    )
    assert isinstance(d, Tensor)
    return head_gradients(d, (input, weight, bias, low, up), needs)


def head_gradients(
    d: Tensor, head: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Of input, weight, bias, low and up, from the gradient d of the logits."""
    factors = (head[1], head[0], None, head[4], head[3])
    found: list[Tensor | None] = []
    for i, (tensor, factor) in enumerate(zip(head, factors, strict=True)):
        if not needs[i] or tensor is None:
            found.append(None)
        elif factor is None:
            found.append(d.sum(0).to(tensor.dtype))
        else:
            side = d.t() if i in (1, 4) else d
            found.append(torch.mm(side, wide(factor)).to(tensor.dtype))
    return tuple(found)
