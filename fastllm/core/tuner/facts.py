"""What a measurement holds for: the device, the versions around it, the sources of the kernels."""

import functools
import hashlib
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import torch

from fastllm import _C
from fastllm.core.device import cpu_info, describe
from fastllm.core.measure import last_level_cache

Facts = dict[str, Any]

_PACKAGE = Path(__file__).parents[2]


def facts(device: str) -> Facts:
    """All that has to be equal for a figure to be used again; JSON's own types."""
    if torch.device(device).type == "cpu":
        return _cpu(_C.isa())
    return _gpu(device)


@functools.cache
def _cpu(isa: str) -> Facts:
    cpu = cpu_info()
    return {
        "device": cpu.name,
        "model": _cpu_model(),
        "isa": isa,
        "cores": cpu.cores,
        "cache": last_level_cache(),
        "torch": _release(torch.__version__),
    }


@functools.cache
def _gpu(device: str) -> Facts:
    card = torch.cuda.get_device_properties(device)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "torch": _release(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "driver": driver,
    }


def file_name(device: str) -> str:
    """A file name for this device and these versions; another machine's file has another one."""
    text = repr(sorted(facts(device).items()))
    return f"{describe(device)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"


def _release(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: the local part only says where the wheel came from."""
    return version.split("+")[0]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def _cpu_model(path: str = "/proc/cpuinfo") -> str:
    """Family, model and stepping: virtual machines give many processors the same name."""
    try:
        text = Path(path).read_text().split("\n\n")[0]
    except OSError:
        return ""
    found = dict(re.findall(r"^(cpu family|model|stepping)\s*:\s*(\S+)", text, re.MULTILINE))
    return "-".join(found.values())


# ---- the sources of the kernels


# families whose kernels are not named after them; (): Python code in the family's cpu.py
_KERNELS = {
    ("matmul", "cpu"): ("gemm",),
    ("activation", "cpu"): ("activation", "elementwise"),
    ("grouped", "cpu"): ("gemm",),
    ("dropout", "cpu"): ("dropout", "keep"),
    ("moe", "cpu"): (),
    ("loss", "cpu"): ("loss", "distill"),
    ("quant_linear", "cpu"): ("qgemm",),
    ("quant_linear", "cuda"): ("quant_matmul",),
}


@functools.cache
def source_hash(family: str, kind: str) -> str:
    """A hash of the kernels of a family of ops for devices of this kind ("cpu" or a GPU's).

    Kernels are found by name: norm's are in norm.* and group_norm.*, attention's in attention.*
    and attention_forward.*; the list above has other names. Where no file is known, every kernel
    counts.
    """
    named = _KERNELS.get((family, kind))
    if named == ():
        code = (_PACKAGE / "ops" / family / "cpu.py").read_bytes()
        return hashlib.sha256(code).hexdigest()[:12]
    pairs = [p.split(":") for p in _C.sources.split(",") if p]
    hashes = dict(pairs) if kind == "cpu" else _triton_sources()
    mine = {n for n in hashes for stem in named or (family,) if f"_{stem}_" in f"_{n}_"} or {
        *hashes
    }
    text = repr(sorted((n, h) for n, h in hashes.items() if n in mine))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _triton_sources() -> dict[str, str]:
    import fastllm.kernels  # where it is installed: beside the package, or from the source tree

    found = {}
    for path in sorted(Path(fastllm.kernels.__path__[0]).glob("*.py")):
        found[path.stem] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def cache_folder() -> Path:
    """Where the user's tables are: FASTLLM_CACHE_DIR, by default a folder of the user's cache."""
    named = os.environ.get("FASTLLM_CACHE_DIR")
    if named:
        return Path(named).expanduser() / "tune"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "fastllm" / "tune"


def shipped_folder() -> Path:
    """Where the package's own tables are."""
    return _PACKAGE / "tables"
