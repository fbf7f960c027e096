"""Functions with torch.nn.functional's names, argument order and semantics, plus the fused ones.

Every function takes `backend=` to force an implementation; without it, the best one here runs.
"""

from fastllm.ops.activation import geglu, gelu, relu2, silu, swiglu
from fastllm.ops.attention import (
    attention_varlen,
    attention_with_kv_cache,
    merge_attention,
    scaled_dot_product_attention,
)
from fastllm.ops.dropout import dropout_add
from fastllm.ops.embedding import embedding
from fastllm.ops.grouped import grouped_linear
from fastllm.ops.linear_distill import linear_distillation_loss
from fastllm.ops.linear_loss import linear_cross_entropy, token_log_probs
from fastllm.ops.loss import cross_entropy, distillation_loss, hidden_state_loss
from fastllm.ops.matmul import gated_linear, linear, matmul
from fastllm.ops.matmul.main_grad import linear_main_grad
from fastllm.ops.moe import moe_permute, moe_route, moe_unpermute
from fastllm.ops.norm import (
    add_layer_norm,
    add_rms_norm,
    group_norm,
    layer_norm,
    rms_norm,
)
from fastllm.ops.preference import (
    cpo_loss,
    dpo_loss,
    grpo_loss,
    kto_loss,
    orpo_loss,
    sequence_log_probs,
    simpo_loss,
)
from fastllm.ops.quant_linear import quant_linear
from fastllm.ops.rotary import rotary_embedding, rotary_embedding_
from fastllm.ops.softmax import log_softmax, softmax
from fastllm.ops.sparse_linear import sparse_linear

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_varlen",
    "attention_with_kv_cache",
    "cpo_loss",
    "cross_entropy",
    "distillation_loss",
    "dpo_loss",
    "dropout_add",
    "embedding",
    "gated_linear",
    "geglu",
    "gelu",
    "group_norm",
    "grouped_linear",
    "grpo_loss",
    "hidden_state_loss",
    "kto_loss",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_distillation_loss",
    "linear_main_grad",
    "log_softmax",
    "matmul",
    "merge_attention",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "orpo_loss",
    "quant_linear",
    "relu2",
    "rms_norm",
    "rotary_embedding",
    "rotary_embedding_",
    "scaled_dot_product_attention",
    "sequence_log_probs",
    "silu",
    "simpo_loss",
    "softmax",
    "sparse_linear",
    "swiglu",
    "token_log_probs",
]
