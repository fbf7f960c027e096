"""`fastllm info`: what this machine has, and which backends can run on it."""

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastllm.cli.console import output, table
from fastllm.core.device import cpu_info, gpu_info
from fastllm.core.measure import last_level_cache
from fastllm.core.memory import memory_stats
from fastllm.core.op import OPS, Op
from fastllm.core.tuner import table as tables

_PREFIXES = ("FASTLLM_", "TRITON_", "OMP_", "MKL_", "KMP_", "GOMP_")
_NAMES = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "HF_HUB_OFFLINE", "LD_PRELOAD")
_PACKAGES = ("fastllm-kernels", "torch", "triton", "transformers", "numpy")


def run(args: argparse.Namespace) -> int:
    """Prints it all."""
    console = output()
    console.print(_machine())
    if OPS:
        _backends(console)
    console.print(_tables())
    console.print(_settings())
    return 0


def _machine() -> Table:
    made = table("Machine", "", "")
    cpu = cpu_info()
    others = [level for level in cpu.isa_levels if level != cpu.isa]
    levels = f"{cpu.isa} in use" + (f"; also {', '.join(others)}" if others else "")
    made.add_row("CPU", escape(cpu.name))
    made.add_row("instruction set", levels)
    made.add_row("threads", f"{cpu.threads} in use of {cpu.cores} cores")
    made.add_row("last-level cache", _size(last_level_cache()))
    for gpu in gpu_info():
        major, minor = gpu.capability
        made.add_row("GPU", f"{escape(gpu.name)}, sm_{major}{minor}, {_size(gpu.memory)}")
    if not gpu_info():
        made.add_row("GPU", f"none; torch is built for CUDA: {torch.version.cuda or 'no'}")
    made.add_row("Python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in _PACKAGES:
        made.add_row(package, _version(package))
    return made


def _backends(console: Console) -> None:
    """One row an op; a reason that keeps a backend from running here is a footnote."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = list(dict.fromkeys(name for op in OPS.values() for name in op.backends))
    made = table("Backends", "op", *names)
    notes: dict[str, int] = {}
    for op in OPS.values():
        choice = _choice(op, device)
        cells = [_cell(op, name, choice, notes) for name in names]
        made.add_row(op.name, *cells)
    console.print(made)
    console.print(f"  auto: what runs on {device} when nothing is asked for", style="dim")
    for reason, number in notes.items():
        console.print(f"  [{number}] {reason}", style="dim", markup=False)


def _cell(op: Op, name: str, choice: str, notes: dict[str, int]) -> str:
    backend = op.backends.get(name)
    if backend is None:
        return "-"
    if backend.missing is not None:
        reason = f"{name}: {backend.missing}"
        return f"no \\[{notes.setdefault(reason, len(notes) + 1)}]"
    return "[bold green]auto[/]" if name == choice else "[green]yes[/]"


def _choice(op: Op, device: str) -> str:
    """The backend of the op's first case, or what is said when no backend serves it."""
    from fastllm.core.errors import UnsupportedError

    if not op.cases:
        return ""
    try:
        return op.select(op.cases[0].args(device)).name
    except UnsupportedError:
        return ""


def _tables() -> Table:
    """Which tables of measured choices apply; where there is none, the heuristics do."""
    made = table("Tuning", "", "")
    made.add_row("FASTLLM_TUNE", tables.MODE)
    if tables.MODE == "off":
        return made
    devices = ["cpu", *(f"cuda:{i}" for i in range(len(gpu_info())))]
    for device in devices:
        known = tables.layers(device)
        for what, entries, path in (
            ("yours", known.user, tables.user_path(device)),
            ("shipped", known.shipped, tables.shipped_path(device)),
        ):
            count = sum(map(len, entries.values()))
            text = f"{count} choices, {path}" if count else "none for this device and versions"
            made.add_row(f"{device}: {what}", escape(text))
        if not known.names():
            made.add_row(f"{device}: in force", "heuristics; `fastllm tune` measures")
    return made


def _settings() -> Table:
    made = table("Memory pool and environment", "", "")
    for key, value in memory_stats().items():
        made.add_row(f"pool: {key.replace('_', ' ')}", _number(key, value))
    found = [k for k in sorted(os.environ) if k.startswith(_PREFIXES) or k in _NAMES]
    for name in found:
        made.add_row(name, escape(os.environ[name]))
    if not found:
        made.add_row("environment", "no variable that matters is set")
    return made


def _number(key: str, value: Any) -> str:
    sized = isinstance(value, int) and ("bytes" in key or key == "limit")
    return _size(value) if sized else str(value)


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
