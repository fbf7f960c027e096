"""MultiheadAttention, drop-in; Attention: the block of today's language models."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as stock

from fastllm import functional as F
from fastllm.core.op import OPS
from fastllm.nn.linear import Linear
from fastllm.nn.norm import RMSNorm
from fastllm.nn.worth import worth


def worth_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    training: bool | None = None,
) -> bool:
    """Whether attention of query [B, H, T, D] runs on anything but torch here."""
    if torch.compiler.is_compiling():
        return True
    op, right = OPS["attention"], 0 if is_causal else -1
    args = (query, key, value, attn_mask, None, sinks, None, 0.0, 1.0, -1, right, 0, softcap)
    if training is None:
        training = torch.is_grad_enabled() and query.requires_grad
    found = op.routes.find(args, training)
    run = found[0] if found else op.forced(args, None) or op.default(args, training)
    return run.name != "torch"


def visible_keys(mask: Tensor) -> Tensor | None:
    """An additive mask [B, 1, 1, S] that only hides keys, as a boolean one; None: it is another.

    Kernels skip blocks that a boolean mask hides. None, too, where a look at the values would
    have to wait for a device, and where a sequence has no key at all.
    """
    if torch.compiler.is_compiling() or not mask.is_cpu or mask.requires_grad:
        return None
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if bool((seen | hidden).all()) and bool(seen.any(-1).all()):
        return seen
    return None


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention (Vaswani et al. 2017); fused where need_weights is False.

    query [T, B, E], key and value [S, B, E]; with batch_first, B comes first; B may be missing.
    Returns (output like query, None). Weights, add_bias_kv and add_zero_attn are torch's own
    code, and so are small inputs; masks mean what they mean there. A query that sees no key
    gets 0.
    """

    backend: str | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        hint = is_causal and attn_mask is not None
        if (
            need_weights
            or hint != is_causal  # torch's own error
            or not self._plain(query, key, value, key_padding_mask, attn_mask)
        ):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        mask = self._mask(None if hint else attn_mask, key_padding_mask, q, k)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, hint, backend=self.backend
        )
        if query.dim() == 2:
            out = out[0].transpose(0, 1)
        else:
            out = out.permute(0, 2, 1, 3) if self.batch_first else out.permute(2, 0, 1, 3)
        return _linear(out.flatten(-2), self.out_proj.weight, self.out_proj.bias), None

    def _plain(
        self, query: Any, key: Any, value: Any, padding: Tensor | None, mask: Tensor | None
    ) -> bool:
        """Whether the call is an ordinary one, and worth a kernel."""
        tensors = [query, key, value, *(m for m in (padding, mask) if m is not None)]
        if not all(isinstance(x, Tensor) and not x.is_nested for x in tensors):
            return False
        if torch.overrides.has_torch_function(tensors) or self.bias_k is not None:
            return False
        dim = query.dim()
        if self.add_zero_attn or dim not in (2, 3) or key.dim() != dim:
            return False
        if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
            return False
        batch, t = self._sizes(query)
        of_key, s = self._sizes(key)
        widths = (query.shape[-1], key.shape[-1], value.shape[-1])
        if of_key != batch or key.shape[:-1] != value.shape[:-1]:
            return False
        if widths != (self.embed_dim, self.kdim, self.vdim):
            return False
        kinds = (torch.bool, query.dtype, torch.float32)
        if any(m is not None and m.dtype not in kinds for m in (padding, mask)):
            return False
        rows = (batch, s) if dim == 3 else (s,)
        if padding is not None and tuple(padding.shape) != rows:
            return False
        full = ((t, s), (batch * self.num_heads, t, s))
        if mask is not None and tuple(mask.shape) not in full:
            return False
        if self.backend is not None:
            return True
        q, k = (query.new_empty((batch, self.num_heads, n, self.head_dim)) for n in (t, s))
        training = torch.is_grad_enabled() and (
            query.requires_grad or self.out_proj.weight.requires_grad
        )
        hidden = mask if padding is None else padding[:, None, None]
        return worth_attention(q, k, k, hidden, training=training)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """Batch and length."""
        if x.dim() == 2:
            return 1, x.shape[0]
        return (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, all heads side by side."""
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim:
            if query is key and key is value:
                return _linear(query, self.in_proj_weight, bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(_linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, H, T, D] of what was projected."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor
    ) -> Tensor | None:
        """Both masks as one, of four dimensions; a boolean one is True where a key is seen."""
        if mask is not None:
            shape = (query.shape[0], self.num_heads, query.shape[2], key.shape[2])
            mask = mask.view(shape) if mask.dim() == 3 else mask[None, None]
            mask = ~mask if mask.dtype == torch.bool else mask
        if padding is None:
            return mask
        padding = padding.view(query.shape[0], 1, 1, -1)
        if padding.dtype == torch.bool:
            padding = ~padding
        else:
            seen = visible_keys(padding)
            padding = padding if seen is None else seen
        return padding if mask is None else _both(mask, padding, query.dtype)


def _both(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that hides what either hides."""
    if one.dtype == other.dtype == torch.bool:
        return one & other
    if one.dtype == torch.bool:
        one, other = other, one
    if other.dtype == torch.bool:
        return one.masked_fill(~other, -torch.inf)
    return one + other


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (F if worth(input, weight, bias) else stock).linear(input, weight, bias)


class Attention(torch.nn.Module):
    """Self-attention with grouped heads and rotated positions, as in Llama, Gemma 2, Qwen 3.

    embed_dim     width E of input and output; num_heads H, each `head_dim` wide (None: E / H)
    num_kv_heads  None: H; fewer heads of keys and values (Ainslie et al. 2023), a divisor of H
    bias          of q_proj, k_proj, v_proj and o_proj
    qk_norm       RMSNorm of each head's queries and keys, before they are rotated
    is_causal     a token sees itself and what is before it
    window        (left, right): how far it sees; None: everything
    softcap       0 (off), or scores become softcap * tanh(scores / softcap)
    scale         None: head_dim ** -0.5

    forward(input [B, T, E], cos=None, sin=None, attn_mask=None) -> [B, T, E]; cos and sin [T, R]
    or [B, T, R] as in fastllm.functional.rotary_embedding, attn_mask as in
    scaled_dot_product_attention. ValueError when the numbers of heads do not fit.
    """

    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        is_causal: bool = True,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        scale: float | None = None,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = num_heads if num_kv_heads is None else num_kv_heads
        if groups < 1 or num_heads % groups:
            raise ValueError(f"num_kv_heads: expected a divisor of {num_heads}, found {groups}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {embed_dim}, found {num_heads}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, groups
        self.head_dim = head_dim or embed_dim // num_heads
        self.is_causal, self.window, self.softcap = is_causal, window, softcap
        self.scale, self.dropout = scale, dropout
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, narrow = num_heads * self.head_dim, groups * self.head_dim
        self.q_proj = Linear(embed_dim, inner, bias, **where)
        self.k_proj = Linear(embed_dim, narrow, bias, **where)
        self.v_proj = Linear(embed_dim, narrow, bias, **where)
        self.o_proj = Linear(inner, embed_dim, bias, **where)
        self.q_norm = RMSNorm(self.head_dim, norm_eps, **where) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, norm_eps, **where) if qk_norm else None

    def forward(
        self,
        input: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        width = (-1, self.head_dim)
        q = self.q_proj(input).unflatten(-1, width)
        k = self.k_proj(input).unflatten(-1, width)
        v = self.v_proj(input).unflatten(-1, width).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cos is not None and sin is not None:
            q, k = F.rotary_embedding(q, k, cos, sin)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask, self.dropout if self.training else 0.0, self.is_causal, self.scale,
            True, window=self.window, softcap=self.softcap, backend=self.backend,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(-2))
