"""fastllm: fused kernels that make an existing PyTorch model train and run faster, on CPU and GPU.

    import fastllm
    handle = fastllm.swap(model)   # in place, reversible, proven: handle.report(), handle.restore()

See fastllm.functional, fastllm.nn, and `fastllm --help`.
"""

from fastllm import functional as functional
from fastllm import nn as nn
from fastllm import optim as optim
from fastllm import quant as quant
from fastllm.core.backend import backend as backend
from fastllm.core.errors import UnsupportedError as UnsupportedError
from fastllm.core.memory import empty_cache as empty_cache
from fastllm.core.memory import memory_stats as memory_stats
from fastllm.swap import swap as swap
from fastllm.swap.tuning import tune as tune

__version__ = "0.1.0"
