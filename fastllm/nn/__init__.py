"""Drop-in modules: subclasses of torch's with the same constructor, state_dict and repr.

And the parts of a transformer that torch has no module for: Attention, GatedMLP, MLP,
RotaryEmbedding.
"""

from fastllm.nn.activation import GELU, SiLU
from fastllm.nn.attention import Attention, MultiheadAttention
from fastllm.nn.linear import Embedding, Linear
from fastllm.nn.loss import (
    CrossEntropyLoss,
    DistillationLoss,
    LinearCrossEntropyLoss,
    LinearDistillationLoss,
)
from fastllm.nn.mlp import MLP, GatedMLP
from fastllm.nn.moe import MoE
from fastllm.nn.norm import GroupNorm, LayerNorm, RMSNorm
from fastllm.nn.preference import CPOLoss, DPOLoss, GRPOLoss, KTOLoss, ORPOLoss, SimPOLoss
from fastllm.nn.rotary import RotaryEmbedding

__all__ = [
    "GELU",
    "MLP",
    "Attention",
    "CPOLoss",
    "CrossEntropyLoss",
    "DPOLoss",
    "DistillationLoss",
    "Embedding",
    "GRPOLoss",
    "GatedMLP",
    "GroupNorm",
    "KTOLoss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LinearDistillationLoss",
    "MoE",
    "MultiheadAttention",
    "ORPOLoss",
    "RMSNorm",
    "RotaryEmbedding",
    "SiLU",
    "SimPOLoss",
]
