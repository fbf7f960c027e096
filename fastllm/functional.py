"""Functions with torch.nn.functional's names, argument order and semantics, plus the fused ones.

Every function takes `backend=` to force an implementation; without it, the best one here runs.
"""

from fastllm.ops.activation import geglu, gelu, relu2, silu, swiglu
from fastllm.ops.embedding import embedding
from fastllm.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    group_norm,
    layer_norm,
    rms_norm,
)
from fastllm.ops.rotary import rotary_embedding, rotary_embedding_

__all__ = ["add_layer_norm", "add_rms_norm", "group_norm", "layer_norm", "rms_norm"]
__all__ += ["geglu", "gelu", "relu2", "silu", "swiglu"]
__all__ += ["embedding", "rotary_embedding", "rotary_embedding_"]
