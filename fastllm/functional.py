"""Functions with torch.nn.functional's names, argument order and semantics, plus the fused ones.

Every function takes `backend=` to force an implementation; without it, the best one here runs.
"""

from fastllm.ops.matmul import gated_linear, linear, matmul
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
    "gated_linear",
    "group_norm",
    "layer_norm",
    "linear",
    "matmul",
    "rms_norm",
]
