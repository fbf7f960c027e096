"""Gives the compiled fast calls what they need of torch.

A fast call (csrc/fast_call.cpp) is a whole eager call in C: it checks, allocates and runs. It
answers None when the call is not an ordinary one, True when it is but wants gradients.
"""

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
    torch._C._functorch.peek_interpreter_stack,
    torch._C._is_any_autocast_enabled,
    torch._C._get_tracing_state,
)

_C.bind_torch(
    torch.Tensor,
    torch.nn.Parameter,
    torch.empty_like,
    memory.empty_like,
    memory.POOL_FROM,
    torch.Tensor.is_neg,
    torch.is_grad_enabled,
    torch.get_num_threads,
    choice,
    vars(forward_ad),
    GUARDS,
)
