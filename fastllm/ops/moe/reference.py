"""moe_permute and moe_unpermute in plain torch: differentiable, in float64 the oracle."""

import torch
from torch import Tensor


def moe_permute(input: Tensor, position: Tensor) -> Tensor:
    """rows[position[t, j]] = input[t]"""
    return input[tokens_of(position)]


def moe_unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """output[t] = sum over j of weights[t, j] * rows[position[t, j]]"""
    picked = _picked(_wide(rows), position)
    if weights is not None:
        picked = picked * weights.to(picked.dtype).unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


def moe_permute_backward(
    grad_output: Tensor, input: Tensor, position: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """dinput[t] = sum over j of drows[position[t, j]]"""
    if not needs[0]:
        return (None,)
    return (moe_unpermute(grad_output, position, None).to(input.dtype),)


def moe_unpermute_backward(
    grad_output: Tensor,
    rows: Tensor,
    position: Tensor,
    weights: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """drows[position[t, j]] = weights[t, j] dy[t]; dweights[t, j] = rows[position[t, j]] . dy[t]"""
    dy = _wide(grad_output)
    drows = dweights = None
    if needs[0]:
        drows = dy[tokens_of(position)]
        if weights is not None:
            drows = drows * weights.to(dy.dtype).reshape(-1)[order_of(position)].unsqueeze(-1)
        drows = drows.to(rows.dtype)
    if needs[1] and weights is not None:
        dweights = (_picked(_wide(rows), position) * dy.unsqueeze(1)).sum(-1).to(weights.dtype)
    return drows, dweights


def order_of(position: Tensor) -> Tensor:
    """The inverse of `position`: which (token, choice) lies at each place."""
    flat = position.reshape(-1)
    return torch.empty_like(flat).scatter_(0, flat, torch.arange(flat.numel(), device=flat.device))


def tokens_of(position: Tensor) -> Tensor:
    """Which token lies at each place."""
    return order_of(position) // max(1, position.shape[1])


def _picked(rows: Tensor, position: Tensor) -> Tensor:
    """[tokens, choices, hidden]"""
    return rows[position.reshape(-1)].reshape(*position.shape, rows.shape[1])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
