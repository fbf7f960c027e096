"""linear_cross_entropy in plain torch: any float dtype, differentiable, in float64 the oracle."""

from typing import Any

from torch import Tensor

from fastllm.ops.loss import reference

_forward: Any = reference.cross_entropy
_backward: Any = reference.cross_entropy_backward


def _logits(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = reference.wide(input) @ reference.wide(weight).t()
    return logits if bias is None else logits + reference.wide(bias)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """cross_entropy(input @ weight^T + bias, target)"""
    loss, lse = _forward(
        _logits(input, weight, bias), target, class_weight, *options[:6], False, False
    )
    return loss.to(input.dtype), lse


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    lse: Tensor,
    gradient: Any,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    """dX = dL W, dW = dL^T X, db = sum of dL, with dL the gradient of the logits."""
    needs = rest[-1]
    (d,) = _backward(
        grad_loss, _logits(input, weight, bias), target, class_weight, lse, None, *rest[:6],
        False, False, (True,),
    )  # fmt: skip
    assert d is not None
    return (
        (d @ reference.wide(weight)).to(input.dtype) if needs[0] else None,
        (d.t() @ reference.wide(input)).to(weight.dtype) if needs[1] else None,
        d.sum(0).to(bias.dtype) if needs[2] and bias is not None else None,
    )
