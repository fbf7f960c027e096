"""What a launcher asks of a device: its multiprocessor count, and to be the current one."""

import contextlib
import functools

import torch

# threads of a program at most, and of a warp (a wavefront on AMD GPUs)
MAX_THREADS = 1024
MAX_WARPS = MAX_THREADS // (64 if torch.version.hip else 32)

_HERE = contextlib.nullcontext()


def on(device):
    """A context in which `device` is current: Triton launches on the current device.

    >>> with on(x.device):
    ...     kernel[grid](x)
    """
    kind = device.type
    if kind == "cuda":
        if device.index == torch.cuda.current_device():
            return _HERE
        return torch.cuda.device(device)
    if kind == "xpu":
        return torch.xpu.device(device)
    return _HERE


@functools.cache
def multiprocessors(device):
    """How many multiprocessors `device` has: what a persistent grid is sized by."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).max_compute_units
    # meta tensors stand for an H100 when kernels are compiled ahead of time; Triton's
    # interpreter runs programs one by one, so a few of them do
    return 132 if device.type == "meta" else 2
