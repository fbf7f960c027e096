"""Drop-in optimizers and what surrounds the step; EMA and schedules are torch's own.

>>> optimizer = fastllm.optim.AdamW(model.parameters(), lr=3e-4, state_dtype="int8")
"""

from fastllm.optim.adam import Adam, AdamW
from fastllm.optim.grads import accumulate_grad, clip_grad_norm_
from fastllm.optim.lion import Lion
from fastllm.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Lion", "accumulate_grad", "clip_grad_norm_"]
