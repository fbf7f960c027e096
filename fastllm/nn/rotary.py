"""RotaryEmbedding: positions rotated into queries and keys (RoFormer, Su et al. 2021)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import functional as F


class RotaryEmbedding(torch.nn.Module):
    """Rotates query [B, H, T, D] and key [B, G, T, D] by their positions; returns both.

    dim            how many of the D elements of a head are rotated, an even number
    max_positions  tokens 0 to max_positions - 1 have a place in the tables
    base           wavelengths run from 2 pi to 2 pi base
    interleaved    pairs lie side by side (the paper), not half of `dim` apart (Llama)

    The tables cos and sin [max_positions, dim / 2] are float32 buffers outside the state_dict,
    and stay so when the module is converted; they are made again wherever it is moved to.
    ValueError when `dim` is odd, or there are more tokens than positions.
    """

    backend: str | None = None
    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        dim: int,
        max_positions: int = 4096,
        base: float = 10000.0,
        interleaved: bool = False,
        device: Any = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim: expected an even positive number, found {dim}")
        self.dim, self.max_positions = dim, max_positions
        self.base, self.interleaved = base, interleaved
        self._make(torch.device(device) if device is not None else torch.get_default_device())

    def _make(self, device: torch.device) -> None:
        steps = torch.arange(0, self.dim, 2, dtype=torch.float64, device="cpu") / self.dim
        rows = torch.arange(self.max_positions, dtype=torch.float64, device="cpu")
        angles = torch.outer(rows, self.base**-steps)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.float().to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        self._make(self.cos.device)
        return self

    def forward(
        self, query: Tensor, key: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        length = query.shape[-2]
        if length > self.max_positions and position_ids is None:
            raise ValueError(
                f"query: expected at most max_positions = {self.max_positions} tokens, "
                f"found {length}"
            )
        cos, sin = (self.cos, self.sin) if position_ids is not None else self._rows(length)
        return F.rotary_embedding(
            query,
            key,
            cos,
            sin,
            interleaved=self.interleaved,
            position_ids=position_ids,
            rotary_dim=self.dim,
            backend=self.backend,
        )

    def _rows(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]

    def extra_repr(self) -> str:
        pairs = ", interleaved=True" if self.interleaved else ""
        return f"{self.dim}, max_positions={self.max_positions}, base={self.base:g}{pairs}"
