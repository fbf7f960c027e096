"""Functions with torch.nn.functional's names, argument order and semantics, plus the fused ones.

Every function takes `backend=` to force an implementation; without it, the best one here runs.
"""

from fastllm.ops.activation import geglu, gelu, relu2, silu, swiglu
from fastllm.ops.grouped import grouped_linear
from fastllm.ops.moe import moe_permute, moe_route, moe_unpermute
from fastllm.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    group_norm,
    layer_norm,
    rms_norm,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "geglu",
    "gelu",
    "group_norm",
    "grouped_linear",
    "layer_norm",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "relu2",
    "rms_norm",
    "silu",
    "swiglu",
]
