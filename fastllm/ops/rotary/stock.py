"""Stock PyTorch: what Hugging Face's apply_rotary_pos_emb computes."""

from torch import Tensor, cat

from fastllm.core.backend import Backend
from fastllm.ops.rotary.reference import partner


def rotary_embedding(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    if cos.shape[-1] < rotary_dim:
        cos, sin = (
            t.repeat_interleave(2, -1) if interleaved else cat([t, t], -1) for t in (cos, sin)
        )

    def rotate(x: Tensor) -> Tensor:
        if rotary_dim == x.shape[-1]:
            return (x * cos + partner(x, interleaved) * sin).to(x.dtype)
        turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
        out = turned * cos + partner(turned, interleaved) * sin
        return cat([out.to(x.dtype), rest], -1)

    return rotate(query), rotate(key)


BACKEND: Backend = Backend("torch", rotary_embedding)
