"""Calls that the tuner's tests make."""

import timeit

import torch

from fastllm.core.op import OPS
from fastllm.core.tuner import routes, table

LAYER = OPS["layer_norm"]


def layer_args(rows=4, cols=48, dtype=torch.float32, grad=False):
    x = torch.randn(rows, cols, dtype=dtype, requires_grad=grad)
    w, b = (torch.randn(cols, dtype=dtype, requires_grad=grad) for _ in range(2))
    return x, (cols,), w, b, 1e-5, 0.0


def say(op, args, direction, value, keep=False):
    """Puts a choice into the table."""
    key = routes.call_word(op, args, "cpu")
    made = table.entry(op.family, "cpu", value, {value: 1e-6})
    table.learn("cpu", {f"{op.name}.{direction}": {key: made}}, keep)


def ours(out):
    """Whether a result came out of an autograd.Function of ours."""
    return isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)


def microseconds(call, like):
    """What a call takes on an idle machine: in units of a known attribute, as load slows both."""
    number, times, known = 1000, [], []
    for _ in range(200):
        times.append(timeit.timeit(call, number=number))
        known.append(timeit.timeit(lambda: like.shape, number=number))
    return min(times) / min(known) * 0.17  # a tensor's shape takes that long
