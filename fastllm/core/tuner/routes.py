"""An op's calls -> the backend to run, in a quarter of a microsecond.

A call is one number first (csrc/call_key.cpp: shapes, dtypes, strides, devices, other arguments,
whether gradients are wanted, threads). A number not seen before is checked and becomes a key of the
table, in which sizes fall into buckets; the answer, or the op's own default where the table has
none, is remembered for that number.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.tuner import table

if TYPE_CHECKING:
    from fastllm.core.backend import Backend
    from fastllm.core.op import Op

# a call without gradients; a call that wants them, together with its backward
FORWARD, TRAINING = "forward", "training"
_MOST = (
    4096  # calls remembered by an op: a model whose shapes never repeat must not fill the memory
)

_C.bind_call_key(torch._C._get_deterministic_algorithms)
call_key = _C.call_key


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


class Routes:
    """Which backend each call of an op runs on: measured to win, else the op's default."""

    def __init__(self, op: "Op") -> None:
        self.op = op
        self.known: dict[int, tuple[Backend, bool]] = {}
        table.listen(self.reset)

    def reset(self) -> None:
        """Forgets, because the table has changed."""
        self.known.clear()
        self.op.routes = None if self.op.fast and table.MODE == "off" else self

    def find(self, args: tuple, training: bool | None = None) -> "tuple[Backend, bool] | None":
        """(backend, whether gradients are wanted) of a call whose arguments are right.

        None: no ordinary call, or a wrong one. `training` says the direction where the tensors and
        the grad mode do not. Never raises.
        """
        key = call_key(args, training)
        if key is None:
            return None
        try:
            return self.known[key]
        except KeyError:
            return self._look(key, args)

    def _look(self, key: int, args: tuple) -> "tuple[Backend, bool] | None":
        op = self.op
        device = device_of(op, args)
        if device is None:
            return None
        training = bool(key & 1)
        try:
            op.check(*args)
            value = lookup(op, args, device, TRAINING if training else FORWARD)
            if value is None and table.MODE == "on":
                value = _measure(op, args, TRAINING if training else FORWARD)
            run = op.named(value, args) or op.default(args, training)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return None  # the general path explains what is wrong
        if len(self.known) >= _MOST:
            self.known.clear()
        self.known[key] = found = run, training
        if op.fast and _settled() and not _mentioned(op):
            op.routes = None  # its fast calls need nobody to ask: there is nothing to find
        return found


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


def _settled() -> bool:
    """Whether the tables of all devices have been read."""
    loaded = table.loaded()
    wanted = ["cpu"]
    if torch.cuda.is_available():
        wanted += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return table.MODE != "on" and all(device in loaded for device in wanted)


def _mentioned(op: "Op") -> bool:
    """Whether any table has a word about this op."""
    names = {f"{op.name}.{FORWARD}", f"{op.name}.{TRAINING}"}
    return any(names & found.names() for found in table.loaded().values())
