"""What this machine is: facts for reports, file names and tuning keys."""

import functools
import os
import platform
import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CpuInfo:
    """The processor as kernels see it: `isa` is the level in use, `isa_levels` what could be."""

    name: str
    cores: int
    threads: int
    isa: str
    isa_levels: tuple[str, ...]


@dataclass(frozen=True)
class GpuInfo:
    """One GPU: its name, compute capability and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


def cpu_info() -> CpuInfo:
    """The CPU, the threads torch uses now, and the instruction set levels of fastllm's kernels."""
    import fastllm._C as _C

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    return CpuInfo(_cpu_name(), cores, torch.get_num_threads(), _C.isa(), tuple(_C.isa_levels()))


def gpu_info() -> list[GpuInfo]:
    """Every CUDA or ROCm device torch can see."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(GpuInfo(facts.name, (facts.major, facts.minor), facts.total_memory))
    return found


def describe(device: str | torch.device = "cpu") -> str:
    """A name for files: `cpu-intel-xeon-4-cores`, `nvidia-h100-80gb-hbm3`."""
    if torch.device(device).type == "cpu":
        cpu = cpu_info()
        return _slug(f"cpu {cpu.name} {cpu.isa} {cpu.cores} cores")
    return _slug(torch.cuda.get_device_properties(device).name)


@functools.cache
def _cpu_name() -> str:
    """The processor's own name: /proc/cpuinfo on Linux, what Python knows elsewhere."""
    try:
        with open("/proc/cpuinfo") as facts:
            for line in facts:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    plain = re.sub(r"\(R\)|\(TM\)|@.*|\bCPU\b", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
