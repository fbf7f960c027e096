"""`fastllm bench`: ours against stock, compiled and peers, in one run, losses included."""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastllm.cli.app import CliError
from fastllm.cli.bench import peers, readme, report, results
from fastllm.cli.bench.rows import Correctness, Settings, measure_case, measure_overhead
from fastllm.cli.console import output, progress, write_atomically
from fastllm.core.cases import Case
from fastllm.core.device import describe
from fastllm.core.limits import measure_limits
from fastllm.core.measure import thread_count
from fastllm.core.op import OPS, Op

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_TINY = 1 << 10  # bytes moved: a case to read a call's overhead from
_ONE_THREAD = 1 << 20  # bytes moved: below, a kernel runs on one thread anyway


def run(args: argparse.Namespace) -> int:
    """Measures, shows, writes where asked; 1 when a kernel is wrong."""
    if args.readme:
        output().print(f"wrote {readme.rewrite(args.readme)}")
        return 0
    device = _device(args.device)
    dtype = _dtype(args.dtype)
    work = plan(args.family, args.op, args.case, dtype, args.quick)
    settings = Settings(device, args.budget or (0.3 if args.quick else 1.0), not args.no_compile)
    found = measure(work, settings, thread_counts(device, args.threads, args.quick), output())
    for path in _write(args, device, found):
        output().print(f"wrote {path}")
    return 1 if any(row["wrong"] for row in found["rows"]) else 0


def plan(
    family: str | None = None,
    op: str | None = None,
    case: str | None = None,
    dtype: torch.dtype | None = None,
    quick: bool = False,
) -> list[tuple[Op, list[Case]]]:
    """The ops and their cases to time; CliError when nothing fits."""
    families = sorted({o.family for o in OPS.values()})
    if family is not None and family not in families:
        raise CliError(f"no family is called {family!r}; there are {', '.join(families)}")
    if op is not None and op not in OPS:
        raise CliError(f"--op: no op is called {op!r}; there are {', '.join(OPS)}")
    work = []
    for found in OPS.values():
        if family in (None, found.family) and op in (None, found.name):
            cases = [c for c in found.cases if "bench" in c.tags]
            cases = [c for c in cases if dtype in (None, c.dtype) and (case or "") in c.name]
            if cases:
                work.append((found, _quick(found, cases) if quick else cases))
    if not work:
        raise CliError("no case to time fits --op, --case and --dtype")
    return work


def _quick(op: Op, cases: Sequence[Case]) -> list[Case]:
    """One case a dtype: the second largest, which outgrows a core's cache, but not patience."""
    chosen = []
    for dtype in dict.fromkeys(c.dtype for c in cases):
        ordered = sorted((c for c in cases if c.dtype == dtype), key=lambda c: _bytes(op, c))
        chosen.append(ordered[-2:][0])
    return chosen


@functools.cache
def _bytes(op: Op, case: Case) -> int:
    return op.cost(*case.args()).forward_bytes


def thread_counts(device: str, asked: int | None, quick: bool) -> list[int | None]:
    """All threads and then one; what was asked for; or None on a GPU."""
    if torch.device(device).type != "cpu":
        return [None]
    everything = asked or torch.get_num_threads()
    return [everything] if asked or quick or everything == 1 else [everything, 1]


def measure(
    work: Sequence[tuple[Op, list[Case]]],
    settings: Settings,
    threads: Sequence[int | None],
    console: Console,
) -> dict[str, Any]:
    """The whole run, as it is stored; each op's table is printed as soon as it is complete."""
    found = results.header(settings.device)
    found |= {"limits": [], "rows": [], "overhead": [], "absent": peers.absent(settings.device)}
    with progress() as bars:
        bar = bars.add_task("limits of this machine", total=sum(len(c) for _, c in work))

        def tick(what: str) -> None:
            bars.update(bar, description=what)

        for count in threads:
            limits = measure_limits(settings.device, count, min(2 * settings.budget, 2.0))
            found["limits"].append(results.limits_entry(limits))
        _print_limits(console, found["limits"])
        correctness = Correctness(settings.device, tick)
        for op, cases in work:
            rows: list[dict[str, Any]] = []
            for case in cases:
                for row in _case_rows(op, case, threads, settings, correctness, tick):
                    rows.append(row)
                bars.advance(bar)
            found["rows"] += rows
            console.print(report.terminal(op.name, rows))
            _print_wrong(console, rows)
        tick("what a call costs")
        found["overhead"] = list(_overhead(work, threads, settings))
    _print_end(console, found)
    return found


def _case_rows(
    op: Op,
    case: Case,
    threads: Sequence[int | None],
    settings: Settings,
    correctness: Correctness,
    tick: Callable[[str], Any],
) -> Iterable[dict[str, Any]]:
    small = _bytes(op, case) < _ONE_THREAD
    for place, count in enumerate(threads):
        if place and small:
            continue
        with thread_count(count):
            for row in measure_case(op, case, count, settings, correctness, tick):
                yield row.json()


def _overhead(
    work: Sequence[tuple[Op, list[Case]]], threads: Sequence[int | None], settings: Settings
) -> Iterable[dict[str, Any]]:
    for op, _ in work:
        tiny = [c for c in op.cases if "bench" in c.tags and _bytes(op, c) <= _TINY]
        if tiny:
            yield measure_overhead(op, tiny[0], threads[0], settings)


def _print_limits(console: Console, entries: Iterable[dict[str, Any]]) -> None:
    for x in entries:
        products = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in x["matmul_gflop_s"].items())
        console.print(
            f"limits on {x['threads']} thread(s): copy {x['copy_gb_s']:.1f} GB/s, read "
            f"{x['read_gb_s']:.1f} GB/s, matrix product in GFLOP/s: {products}"
        )


def _print_wrong(console: Console, rows: Iterable[dict[str, Any]]) -> None:
    for reason in dict.fromkeys(row["wrong"] for row in rows if row["wrong"]):
        console.print(f"  no speedup: {reason}", style="bold red", markup=False)
    absent = {f"{n}: {why}" for row in rows for n, why in row["absent"].items()}
    for text in sorted(absent):
        console.print(f"  absent from some rows: {text}", style="dim", markup=False)


def _print_end(console: Console, found: dict[str, Any]) -> None:
    if found["overhead"]:
        console.print(report.overhead_table(found["overhead"]))
    for name, reason in found["absent"].items():
        console.print(f"  {name} is absent: {reason}", style="dim", markup=False)
    console.print(report.tally(found["rows"]))


def _write(args: argparse.Namespace, device: str, found: dict[str, Any]) -> Iterable[Path]:
    if args.json:
        yield results.write(args.json, found)
    if args.out:
        name = describe(device)
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
