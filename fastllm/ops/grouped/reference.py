"""grouped_linear in plain torch: any float dtype, differentiable, in float64 the oracle."""

import torch
from torch import Tensor

from fastllm.ops.grouped.spec import segments


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """y[i] = W[e] x[i] + b[e] for the rows i of expert e; zeros behind the last expert's rows."""
    x, w = _wide(input), _wide(weights)
    parts = []
    for expert, (start, end) in enumerate(segments(offsets, x.shape[0])):
        y = x[start:end] @ w[expert].t()
        parts.append(y if bias is None else y + bias[expert].to(y.dtype))
    parts.append(_rest(x, offsets, w.shape[1]))
    return torch.cat(parts).to(input.dtype)


def grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dx[i] = W[e]^T dy[i]; dW[e] = sum dy[i] x[i]^T, db[e] = sum dy[i] over the rows of e"""
    x, w, dy = _wide(input), _wide(weights), _wide(grad_output)
    dx, dw, db = [], [], []
    for expert, (start, end) in enumerate(segments(offsets, x.shape[0])):
        part = dy[start:end]
        dx.append(part @ w[expert])
        dw.append(part.t() @ x[start:end])
        db.append(part.sum(0))
    dx.append(_rest(x, offsets, x.shape[1]))
    return (
        torch.cat(dx).to(input.dtype) if needs[0] else None,
        _stack(dw, weights) if needs[1] else None,
        _stack(db, bias) if needs[2] and bias is not None else None,
    )


def _stack(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts).to(like.dtype) if parts else torch.zeros_like(like)


def _rest(x: Tensor, offsets: Tensor, cols: int) -> Tensor:
    used = int(offsets[-1]) if offsets.numel() else 0
    return x.new_zeros(x.shape[0] - used, cols)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
