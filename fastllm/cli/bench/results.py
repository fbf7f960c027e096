"""The stored form of a run: what it holds, reading it back, checking it."""

import json
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastllm.cli.app import CliError
from fastllm.cli.console import write_atomically
from fastllm.core.device import cpu_info, describe
from fastllm.core.limits import Limits

SCHEMA = 1
_TOP = {
    "schema": int,
    "device": dict,
    "versions": dict,
    "date": str,
    "limits": list,
    "rows": list,
    "overhead": list,
    "absent": dict,
}
_ROW = {
    "op": str,
    "family": str,
    "case": str,
    "dtype": str,
    "direction": str,
    "threads": (int, type(None)),
    "backend": str,
    "nbytes": int,
    "warm": bool,
    "rounds": int,
    "microseconds": dict,
    "speedup": dict,
    "limit_share": (float, int, type(None)),
    "absent": dict,
    "wrong": (str, type(None)),
    "losses": list,
}


def header(device: str) -> dict[str, Any]:
    """What was measured on, and with."""
    cpu = cpu_info()
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "schema": SCHEMA,
        "device": {
            "type": torch.device(device).type,
            "slug": describe(device),
            "cpu": cpu.name,
            "cores": cpu.cores,
            "isa": cpu.isa,
            "gpu": gpu,
        },
        "versions": {
            "fastllm": _version("fastllm-kernels"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def limits_entry(limits: Limits) -> dict[str, Any]:
    """Limits in GB/s and GFLOP/s."""
    return {
        "threads": limits.threads,
        "copy_gb_s": round(limits.copy / 1e9, 2),
        "read_gb_s": round(limits.read / 1e9, 2),
        "matmul_gflop_s": {name: round(x / 1e9, 1) for name, x in limits.matmul.items()},
    }


def write(path: Path, run: dict[str, Any]) -> Path:
    """Stores a run, whole or not at all."""
    return write_atomically(path, json.dumps(check(run, str(path)), indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A stored run; CliError when the file is not one."""
    try:
        return check(json.loads(path.read_text()), str(path))
    except ValueError as error:
        raise CliError(f"{path}: not a result file: {error}") from None


def check(run: Any, where: str) -> dict[str, Any]:
    """`run` itself; CliError that names the first field that is missing or of the wrong type."""
    if not isinstance(run, dict) or run.get("schema") != SCHEMA:
        raise CliError(f"{where}: expected a result file of schema {SCHEMA}")
    _check_fields(run, _TOP, where)
    for number, row in enumerate(run["rows"]):
        _check_fields(row, _ROW, f"{where}: rows[{number}]")
    return run


def _check_fields(found: Any, fields: dict[str, Any], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise CliError(f"{where}: field {name!r} is missing or of the wrong type")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
