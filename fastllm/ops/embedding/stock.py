"""Stock PyTorch."""

import torch

from fastllm.core.backend import Backend

BACKEND: Backend = Backend("torch", torch.embedding)
