"""`fastllm bench`: ours against stock, compiled and peers, in one run, losses included."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastllm.cli.app import CliError
from fastllm.cli.bench import compare, page, readme, report, results
from fastllm.cli.bench.plan import plan, thread_counts
from fastllm.cli.bench.session import Session, Settings
from fastllm.cli.console import output, write_atomically
from fastllm.core.device import describe
from fastllm.core.measure import thread_count

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_QUICK = 240.0  # seconds: with what starting and the last row take, five minutes at most
_FULL = 3600.0


def run(args: argparse.Namespace) -> int:
    """Measures, shows, writes where asked; 1 when a kernel is wrong or something regressed."""
    if args.readme:
        output().print(f"wrote {readme.rewrite(args.readme)}")
        return 0
    if args.compare:
        before, after = args.compare
        return compare.run(before, after, args.force, output())
    device = _device(args.device)
    with thread_count(args.threads):
        return _measure(args, device, output())


def _measure(args: argparse.Namespace, device: str, console: Console) -> int:
    threads = thread_counts(device, args.threads, args.quick)
    items = plan(args.family, args.op, args.case, _dtype(args.dtype), args.quick, threads)
    budget = args.budget or (_QUICK if args.quick else _FULL)
    settings = Settings(device, budget, 0.25 if args.quick else 1.0, not args.no_compile)
    files = [args.json] if args.json else []
    if args.out:
        files.append(args.out / f"{describe(device)}.json")
    session = Session(items, settings, console, files, _earlier(args, files, device, console))
    try:
        session.run()
    finally:  # an interrupt, too, leaves a report of what was done
        found = session.found
        report.print_end(console, found)
        if found["rows"]:
            for path in _write(args, device, found):
                console.print(f"wrote {path}")
        if not found["complete"]:
            console.print(_stopped(found, bool(files)))
    return 1 if any(row["wrong"] for row in found["rows"]) else 0


def _earlier(
    args: argparse.Namespace, files: list[Path], device: str, console: Console
) -> dict[str, Any] | None:
    """A run to go on with: one that did not end, of the same build on the same machine."""
    for path in files:
        if args.fresh or not path.exists():
            continue
        found = results.resumable(path, device)
        if found:
            console.print(
                f"going on with {path}: {len(found['rows'])} rows are there (--fresh: new)"
            )
            return found
    return None


def _stopped(found: dict[str, Any], stored: bool) -> str:
    done, planned = len(found["rows"]), found["planned"]
    text = f"{done} of {planned} rows were measured within the budget or before the end"
    return f"{text}; the same command goes on from there" if stored else text


def _write(args: argparse.Namespace, device: str, found: dict[str, Any]) -> Iterable[Path]:
    if args.json:
        yield results.write(args.json, found)
    if args.out:
        name = describe(device)
        yield write_atomically(args.out / f"{name}.html", page.html(found))
        yield write_atomically(args.out / f"{name}.md", report.markdown(found))
        yield results.write(args.out / f"{name}.json", found)


def _device(asked: str | None) -> str:
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise CliError(f"--device: expected cpu or cuda, found {asked!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise CliError("--device: torch sees no CUDA device here")
    return asked


def _dtype(asked: str | None) -> torch.dtype | None:
    if asked is None:
        return None
    dtype = DTYPES.get(asked) or getattr(torch, asked, None)
    if dtype not in DTYPES.values():
        raise CliError(f"--dtype: expected one of {', '.join(DTYPES)}, found {asked!r}")
    return dtype
