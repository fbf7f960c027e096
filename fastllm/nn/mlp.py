"""Feed-forward blocks: GatedMLP (SwiGLU, GeGLU: Shazeer 2020) and MLP.

The parameters live in Linear children, so that adapters, hooks and sharding find what they know.
A child that is hooked, wrapped or of another class is called as it is, and only what is left is
fused.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm import functional as F
from fastllm.nn.activation import apply, check_activation
from fastllm.nn.hooks import observed
from fastllm.nn.linear import Linear
from fastllm.nn.worth import worth

FEW = 1 << 16
_GLU = {"gelu": "none", "gelu_tanh": "tanh"}


def weight_of(module: Any) -> Tensor | None:
    """The weight [N, K], where calling `module` is no more than fastllm's linear; else None."""
    transposed = vars(type(module)).get("_fastllm_transposed", False)
    if not (transposed or type(module).forward is Linear.forward) or observed(module):
        return None
    return module.weight.t() if transposed else module.weight


def fuses(module: Any, input: Tensor, activation: str) -> bool:
    """Whether its `activated(input, activation)` does both in one pass, and faster than in two.

    Backward would multiply once more, so this is for calls without gradients. On a CPU it saves a
    call, and a pass over memory that exponentials hide: measured, it pays up to FEW results.
    """
    marked = vars(type(module)).get("_fastllm_fuses", False)
    if not marked or torch.is_grad_enabled() or observed(module):
        return False
    few = input.numel() * module.out_features <= FEW * input.shape[-1]
    return few or activation in ("relu", "relu2") or not input.is_cpu


def gated(activation: str, gate: Any, up: Any, input: Tensor, backend: str | None = None) -> Tensor:
    """activation(gate(input)) * up(input), in as few passes as pay and the modules allow."""
    g, u = weight_of(gate), weight_of(up)
    if g is None or u is None or gate.bias is not None or up.bias is not None:
        return glu(activation, gate(input), up(input), backend)
    if backend is None and not worth(input, g):
        return glu(activation, gate(input), up(input))
    return F.gated_linear(input, g, u, activation=activation, backend=backend)


def glu(activation: str, gate: Tensor, up: Tensor, backend: str | None = None) -> Tensor:
    """activation(gate) * up."""
    if activation == "silu":
        return F.swiglu(gate, up, backend=backend)
    if activation in _GLU:
        return F.geglu(gate, up, _GLU[activation], backend=backend)
    return apply(activation, gate, backend) * up


def activated(activation: str, linear: Any, input: Tensor, backend: str | None = None) -> Tensor:
    """activation(linear(input)), in one pass where it pays and `linear` allows."""
    if backend is None and fuses(linear, input, activation):
        return linear.activated(input, activation)
    weight = weight_of(linear)
    if weight is not None and (backend is not None or worth(input, weight, linear.bias)):
        return F.linear(input, weight, linear.bias, activation=activation, backend=backend)
    return apply(activation, linear(input), backend)


class GatedMLP(torch.nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)); input and output [*, hidden_size].

    activation "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU), "relu" or "relu2". The state_dict
    has the keys of Hugging Face's Llama, Qwen, Gemma and Mistral MLPs. ValueError when the
    activation is another one.
    """

    backend: str | None = None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = Linear(hidden_size, intermediate_size, **like)
        self.up_proj = Linear(hidden_size, intermediate_size, **like)
        self.down_proj = Linear(intermediate_size, hidden_size, **like)

    def forward(self, input: Tensor) -> Tensor:
        hidden = gated(self.activation, self.gate_proj, self.up_proj, input, self.backend)
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class MLP(torch.nn.Module):
    """down_proj(activation(up_proj(x))); input [*, in_features], output [*, out_features].

    hidden_features is the width between; out_features None: as wide as the input. activation is
    "gelu", "gelu_tanh", "silu", "relu" or "relu2"; ValueError when it is another one.
    """

    backend: str | None = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = check_activation(activation)
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        out_features = in_features if out_features is None else out_features
        self.up_proj = Linear(in_features, hidden_features, **like)
        self.down_proj = Linear(hidden_features, out_features, **like)

    def forward(self, input: Tensor) -> Tensor:
        return self.down_proj(activated(self.activation, self.up_proj, input, self.backend))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
