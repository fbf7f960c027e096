"""The stored form of a run: what it holds, reading it back, checking it."""

import hashlib
import json
import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastllm.cli.app import CliError
from fastllm.cli.bench import peers
from fastllm.cli.console import write_atomically
from fastllm.core.device import cpu_info, describe
from fastllm.core.limits import Limits

SCHEMA = 2
_TOP = {
    "schema": int,
    "device": dict,
    "versions": dict,
    "build": str,
    "date": str,
    "load": (float, int),
    "complete": bool,
    "planned": int,
    "seconds": (float, int),
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
    "flops": int,
    "warm": bool,
    "rounds": int,
    "microseconds": dict,
    "quartiles": dict,
    "speedup": dict,
    "bound": (str, type(None)),
    "limit_share": (float, int, type(None)),
    "peak_share": (float, int, type(None)),
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
            **peers.versions(device),
        },
        "build": _build(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load": round(_load(), 2),
    }


def limits_entry(limits: Limits) -> dict[str, Any]:
    """Limits in GB/s and GFLOP/s."""
    return {
        "threads": limits.threads,
        "copy_gb_s": round(limits.copy / 1e9, 2),
        "read_gb_s": round(limits.read / 1e9, 2),
        "matmul_gflop_s": {name: round(x / 1e9, 1) for name, x in limits.matmul.items()},
    }


def limits(entry: dict[str, Any]) -> Limits:
    """The limits that `entry` stores."""
    peaks = {name: x * 1e9 for name, x in entry["matmul_gflop_s"].items()}
    return Limits(entry["copy_gb_s"] * 1e9, entry["read_gb_s"] * 1e9, peaks, entry["threads"])


def key(row: dict[str, Any]) -> tuple[str, str, str, int | None]:
    """What names a row."""
    return (row["op"], row["case"], row["direction"], row["threads"])


def resumable(path: Path, device: str) -> dict[str, Any] | None:
    """The run in `path` if it did not end and is of this machine and this build, else None."""
    try:
        found = read(path)
    except CliError:
        return None
    now = header(device)
    same = all(found[name] == now[name] for name in ("device", "versions", "build"))
    return found if same and not found["complete"] else None


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
        if isinstance(row, dict):
            row.setdefault("peak_share", None)  # older files have none
        _check_fields(row, _ROW, f"{where}: rows[{number}]")
    return run


def _check_fields(found: Any, fields: dict[str, Any], where: str) -> None:
    for name, kind in fields.items():
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise CliError(f"{where}: field {name!r} is missing or of the wrong type")


def _build() -> str:
    """Changes with any line of the package, and with its compiled part."""
    digest = hashlib.sha256()
    for package in ("fastllm", "fastllm.kernels"):
        spec = find_spec(package)
        assert spec and spec.submodule_search_locations, package
        folder = Path(spec.submodule_search_locations[0])
        for path in sorted([*folder.rglob("*.py"), *folder.glob("*.so")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _load() -> float:
    """Processes that wanted to run when the run began: the higher, the noisier."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
