"""Stock PyTorch: the gathers and sums that models write."""

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.moe.reference import tokens_of
from fastllm.ops.moe.spec import fake_permute


def moe_permute(input: Tensor, position: Tensor) -> Tensor:
    return fake_permute(input, position) if position.is_meta else input[tokens_of(position)]


def moe_unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    picked = rows[position.reshape(-1)].reshape(*position.shape, rows.shape[1])
    if weights is not None:
        picked = picked * weights.unsqueeze(-1)
    return picked.sum(1).to(rows.dtype)


BACKENDS: dict[str, Backend] = {
    "moe_permute": Backend("torch", moe_permute),
    "moe_unpermute": Backend("torch", moe_unpermute),
}
