"""moe_permute and moe_unpermute on the CPU: every row is read once and written once.

torch's index_select copies rows on all threads, and its embedding_bag is a weighted sum of rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.memory import empty
from fastllm.ops.moe.reference import order_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def moe_permute(input: Tensor, position: Tensor) -> Tensor:
    return _spread(input, _order(position), position)


def moe_permute_backward(
    grad_output: Tensor, input: Tensor, position: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(grad_input,), None where not needed."""
    return (moe_unpermute(grad_output.to(input.dtype), position, None) if needs[0] else None,)


def moe_unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    _check_range(position, rows.shape[0])
    if not rows.numel() or (weights is not None and weights.dtype != rows.dtype):
        return _summed(rows, position, weights)
    return F.embedding_bag(
        position, rows.contiguous(), mode="sum",
        per_sample_weights=None if weights is None else weights.contiguous(),
    )  # fmt: skip


def moe_unpermute_backward(
    grad_output: Tensor,
    rows: Tensor,
    position: Tensor,
    weights: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """(grad_rows, grad_weights), None where not needed."""
    dy, drows, dweights = grad_output.to(rows.dtype), None, None
    order = _order(position)
    if needs[0]:
        drows = _spread(dy, order, position)
        if weights is not None:
            drows *= weights.reshape(-1)[order].unsqueeze(-1)
    if needs[1] and weights is not None:
        dweights = torch.empty(weights.shape, dtype=weights.dtype)
        for choice, column in enumerate(position.unbind(1)):
            products = rows.index_select(0, column).float().mul_(dy)
            torch.sum(products, 1, dtype=torch.float32, out=(made := torch.empty(len(column))))
            dweights[:, choice] = made
    return drows, dweights


def _summed(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    """One choice after the other, added up in float32."""
    total = torch.zeros(position.shape[0], rows.shape[1])
    for choice, column in enumerate(position.unbind(1)):
        picked = rows.index_select(0, column)
        if weights is None:
            total += picked
        else:
            total.addcmul_(picked.float(), weights[:, choice, None].float())
    return total.to(rows.dtype)


def _spread(input: Tensor, order: Tensor, position: Tensor) -> Tensor:
    out = empty((order.numel(), input.shape[1]), input.dtype)
    if not out.numel():
        return out
    return torch.index_select(input, 0, order // position.shape[1], out=out)


def _order(position: Tensor) -> Tensor:
    _check_range(position, position.numel())
    return order_of(position)


def _check_range(position: Tensor, rows: int) -> None:
    if position.numel():
        least, most = (int(v) for v in position.aminmax())
        if least < 0 or most >= rows:
            raise ValueError(
                f"position: expected places from 0 to {rows - 1}, found {least} to {most}"
            )


def _supports(input: Tensor, position: Tensor, weights: Tensor | None = None) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    for tensor in (input, weights):
        if tensor is not None and tensor.dtype not in _DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')}: computed by torch"
    return None


BACKENDS: dict[str, Backend] = {
    "moe_permute": Backend("cpu", moe_permute, moe_permute_backward, _supports),
    "moe_unpermute": Backend("cpu", moe_unpermute, moe_unpermute_backward, _supports),
}
