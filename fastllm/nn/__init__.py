"""Drop-in modules: subclasses of torch's with the same constructor, state_dict and repr."""

from fastllm.nn.loss import CrossEntropyLoss, DistillationLoss, LinearCrossEntropyLoss
from fastllm.nn.norm import GroupNorm, LayerNorm, RMSNorm

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "GroupNorm",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "RMSNorm",
]
