"""MoE: a mixture of gated feed-forward experts, and the call that runs the experts of others.

For the experts of Hugging Face models (Mixtral, Qwen-MoE, all that `transformers` decorates with
`use_experts_implementation`): they keep `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I], and
are called as experts(hidden_states, top_k_index, top_k_weights). Where `has_gate` and
`is_concatenated` hold, `has_bias`, `has_post_expert_norm` and `_is_expert_parallel` do not, and
`act_fn` is one of ACTIVATIONS, that call is

    moe_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, activation=...)

with both weights seen through `.transpose(1, 2)` where `is_transposed` holds.
"""

import torch
from torch import Tensor

from fastllm import functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


def moe_experts(
    input: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """The weighted sum of the experts that were picked for each token (Shazeer et al. 2017).

    y[t] = sum over j of weights[t, j] * down[e] (act(gate[e] x[t]) * (up[e] x[t])), e = index[t, j]

    input    [tokens, H]
    index    [tokens, choices] int, experts from 0 to E - 1; E and above is none and adds nothing
    weights  [tokens, choices]; their dtype may differ from input's
    gate_up  [E, 2 I, H], gate above up; of input's dtype, as `down`
    down     [E, H, I]

    activation is "silu" (SwiGLU), "gelu" or "gelu_tanh". Returns [tokens, H] in input's dtype.
    Raises ValueError or TypeError for arguments that do not fit.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}"
        )
    position, offsets = F.moe_route(index, gate_up.shape[0])
    rows = F.moe_permute(input, position, backend=backend)
    gate, up = F.grouped_linear(rows, gate_up, offsets, backend=backend).chunk(2, dim=-1)
    if activation == "silu":
        hidden = F.swiglu(gate, up, backend=backend)
    else:
        kind = "tanh" if activation == "gelu_tanh" else "none"
        hidden = F.geglu(gate, up, kind, backend=backend)
    rows = F.grouped_linear(hidden, down, offsets, backend=backend)
    return F.moe_unpermute(rows, position, weights, backend=backend)


class MoE(torch.nn.Module):
    """A router and gated experts: softmax, the best `top_k`, their weighted sum.

    hidden_size, intermediate_size  H and I of every expert
    num_experts, top_k              E, and how many of them each token meets
    activation                      "silu", "gelu" or "gelu_tanh", of the gate
    normalize                       the chosen weights are scaled to add up to 1 (Mixtral; False: as
                                    the softmax over all experts left them)

    Parameters: `router` [E, H], `gate_up_proj` [E, 2 I, H] (gate above up), `down_proj` [E, H, I],
    each uniform within 1 / sqrt(fan in), as torch.nn.Linear's. The softmax is computed in float32.
    Input [*, H], output alike. `router_logits` [tokens, E] of the last call is what an auxiliary
    loss takes. Jiang et al. 2024.
    """

    backend: str | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str = "silu",
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < top_k <= num_experts:
            raise ValueError(
                f"top_k: expected 1 to num_experts ({num_experts}) experts a token, found {top_k}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}"
            )
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_experts, self.top_k = num_experts, top_k
        self.activation, self.normalize = activation, normalize

        def made(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router = made(num_experts, hidden_size)
        self.gate_up_proj = made(num_experts, 2 * intermediate_size, hidden_size)
        self.down_proj = made(num_experts, hidden_size, intermediate_size)
        self.router_logits: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for parameter in self.parameters():
            bound = parameter.shape[-1] ** -0.5
            torch.nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        x = input.reshape(-1, self.hidden_size)
        self.router_logits = torch.nn.functional.linear(x, self.router)
        shares = torch.softmax(self.router_logits, -1, dtype=torch.float32)
        weights, index = torch.topk(shares, self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        y = moe_experts(
            x,
            index,
            weights.to(x.dtype),
            self.gate_up_proj,
            self.down_proj,
            activation=self.activation,
            backend=self.backend,
        )
        return y.view(input.shape)

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.intermediate_size}, num_experts={self.num_experts}, "
            f"top_k={self.top_k}, activation={self.activation!r}, normalize={self.normalize}"
        )
