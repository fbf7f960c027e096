"""Gives the calls in C (csrc/ordinary.h) what they need of torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastllm import _C
from fastllm.core import memory
from fastllm.core.backend import choice

# each says 0, False or None in an ordinary eager call
GUARDS: tuple[Callable[[], Any], ...] = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._is_any_autocast_enabled,
    torch._C._is_tracing,
)

_C.bind_torch(
    torch.Tensor,
    torch.nn.Parameter,
    torch.empty_like,
    memory.empty_like,
    memory.POOL_FROM,
    torch.Tensor.new_empty_strided,
    torch.Tensor.is_neg,
    torch.Tensor.requires_grad,
    torch.is_grad_enabled,
    torch.get_num_threads,
    torch._C._get_deterministic_algorithms,
    choice,
    vars(forward_ad),
    GUARDS,
)
