"""Drop-in modules: subclasses of torch's with the same constructor, state_dict and repr."""

from fastllm.nn.moe import MoE
from fastllm.nn.norm import GroupNorm, LayerNorm, RMSNorm

__all__ = ["GroupNorm", "LayerNorm", "MoE", "RMSNorm"]
