"""Attention: dense, packed, with a cache; forward and backward, on the CPU and on GPUs."""

from fastllm.ops.attention import calls as calls
from fastllm.ops.attention.dense import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from fastllm.ops.attention.kv_cache import (
    attention_with_kv_cache as attention_with_kv_cache,
)
from fastllm.ops.attention.merge import merge_attention as merge_attention
from fastllm.ops.attention.varlen import attention_varlen as attention_varlen
