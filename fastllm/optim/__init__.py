"""Drop-in optimizers and what surrounds the step; EMA and schedules are torch's own.

>>> optimizer = fastllm.optim.AdamW(model.parameters(), lr=3e-4, state_dtype="int8")
"""

from fastllm.optim.adafactor import Adafactor
from fastllm.optim.adam import Adam, AdamW
from fastllm.optim.backward import step_in_backward
from fastllm.optim.grads import accumulate_grad, clip_grad_norm_
from fastllm.optim.lamb import LAMB
from fastllm.optim.lion import Lion
from fastllm.optim.muon import Muon
from fastllm.optim.offload import CPUOffload
from fastllm.optim.scaler import GradScaler
from fastllm.optim.sgd import SGD

__all__ = [
    "LAMB",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "CPUOffload",
    "GradScaler",
    "Lion",
    "Muon",
    "accumulate_grad",
    "clip_grad_norm_",
    "step_in_backward",
]
