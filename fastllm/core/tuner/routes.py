"""An op's calls -> the backend to run, and the call itself, in C (csrc/head.cpp).

A call is one number first: shapes, dtypes, strides, devices, other arguments, whether gradients are
wanted, threads. A number not seen before is checked and becomes a key of the table, in which sizes
fall into buckets; the answer, or the op's own default where the table has none, is remembered for
that number together with the function that runs it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm._C import Head
from fastllm.core.tuner import table

if TYPE_CHECKING:
    from fastllm.core.backend import Backend
    from fastllm.core.op import Op

# a call without gradients; a call that wants them, together with its backward
FORWARD, TRAINING = "forward", "training"
_MOST = (
    4096  # calls remembered by an op: a model whose shapes never repeat must not fill the memory
)


def bucket(size: int) -> int:
    """The next of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: hidden sizes are themselves, mostly."""
    if size <= 2:
        return size
    power = 1 << (size - 1).bit_length()
    return power // 4 * 3 if size <= power // 4 * 3 else power


_SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}


def words(value: Any) -> str:
    """One argument as a word of a key: what decides about speed, and nothing else."""
    if isinstance(value, Tensor):
        dtype = _SHORT.get(value.dtype) or str(value.dtype).removeprefix("torch.")
        layout = "" if value.is_contiguous() else "~"
        return f"{dtype}[{_sizes(tuple(value.shape))}]{layout}"
    if isinstance(value, bool | str) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(bucket(value)) if value >= 0 else "-"
    if isinstance(value, float):
        return "0" if value == 0 else "x"
    if isinstance(value, tuple | list):
        return f"({_sizes(value)})" if all(type(v) is int for v in value) else "(...)"
    return type(value).__name__


def _sizes(shape: Any) -> str:
    """Leading dimensions are rows: what matters is how many there are in all."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    last = [str(bucket(shape[-1]))] if len(shape) else []
    return "x".join([str(bucket(rows)), *last] if len(shape) > 1 else last)


class Routes(Head):
    """Which backend each call of an op runs on: measured to win, else the op's default.

    routes(*args) runs an ordinary call, or answers NotImplemented; routes.find(args, training=None)
    is its (backend, whether gradients are wanted), or None where the call is not ordinary or wrong.
    `training` says the direction where the tensors and the grad mode do not.
    """

    def __init__(self, op: "Op") -> None:
        super().__init__(self._look)
        self.op = op
        table.listen(self.forget)

    def _look(self, key: int, args: tuple) -> tuple | None:
        op = self.op
        device = device_of(op, args)
        if device is None:
            return None
        training = bool(key & 1)
        direction = TRAINING if training else FORWARD
        try:
            op.check(*args)
            value = lookup(op, args, device, direction)
            if value is None and table.MODE == "on":
                value = _measure(op, args, direction)
            run = op.named(value, args) or op.default(args, training)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None  # the general path explains what is wrong
        if len(self) >= _MOST:
            self.forget()
        return ((run, training), *op.prepared(run, training))


def fixed(op: "Op", run: "Backend") -> Head:
    """Routes that ask as much as an op's own, and always answer the same."""

    def look(key: int, args: tuple) -> tuple:
        training = bool(key & 1)
        return ((run, training), *op.prepared(run, training))

    return Head(look)


def _measure(op: "Op", args: tuple, direction: str) -> Any:
    """FASTLLM_TUNE=on: an unknown call is measured, on arguments like its own."""
    from fastllm.core.tuner import jobs  # it imports the op that imports this

    change = jobs.measure_call(op, args, direction)
    return None if change is None else change.after


def lookup(op: "Op", args: tuple, device: str, direction: str) -> str | None:
    """The name of the backend that the table has for a call."""
    name = f"{op.name}.{direction}"
    return table.lookup(device, name, op.family, call_word(op, args, device))


def call_word(op: "Op", args: tuple, device: str) -> str:
    """A call's key in the table."""
    make: Callable[..., str] | None = op.key
    word = " ".join(map(words, args)) if make is None else make(*args)
    return f"{word} t{torch.get_num_threads()}" if device == "cpu" else word


def device_of(op: "Op", args: tuple) -> str | None:
    """The device whose table a call belongs to, if there may be one."""
    for i in op.tensors:
        if isinstance(args[i], Tensor):
            kind = args[i].device.type
            return table.device_name(args[i].device) if kind in ("cpu", "cuda") else None
    return None
