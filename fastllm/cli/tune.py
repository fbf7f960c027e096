"""`fastllm tune`: measures which backend and which config wins here, and keeps it."""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from fastllm.cli.app import CliError
from fastllm.cli.console import output, progress, table
from fastllm.core.op import OPS
from fastllm.core.tuner import facts, jobs, search, shapes, store
from fastllm.core.tuner import table as tables
from fastllm.core.tuner.search import Change, Job
from fastllm.core.tuner.tunable import TUNABLES

_SHOWN = 60  # rows; the rest is in the file


def run(args: argparse.Namespace) -> int:
    """Tunes what was asked for. An interrupt keeps what was found; a second run goes on."""
    if tables.MODE == "off":
        raise CliError("FASTLLM_TUNE=off is set: nothing that is tuned would be used")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.model:
        return _model(args)
    console = output()
    work = [job for threads in _threads(args, device) for job in plan(args, device, threads)]
    if not work:
        raise CliError("nothing to choose between: every call has one backend and one config")
    known = 0 if args.again else sum(job.known is not None for job in work)
    found: list[Change] = []
    begin = time.monotonic()
    try:
        with progress() as bars:
            bar = bars.add_task("tune", total=len(work))

            def tick(job: Job) -> None:
                bars.update(bar, description=f"{job.name} {job.key}"[:60], advance=1)

            for change in search.search(work, args.budget, again=args.again, tick=tick):
                found.append(change)
    except KeyboardInterrupt:
        _say(f"interrupted; {len(found)} found until now are kept: run it again to go on")
        return 130
    if any(c.changed for c in found):
        console.print(changes(found))
    left = len(work) - known - len(found)
    console.print(
        f"measured {len(found)} in {time.monotonic() - begin:.0f} s, {known} were known"
        + (f", {left} are left for another run" if left and args.budget else "")
    )
    path = tables.user_path(tables.device_name(device))
    if args.out:
        path = ship(args.out, device, work)
    console.print(f"kept in {escape(str(path))}")
    return 0


def plan(args: argparse.Namespace, device: str, threads: int | None) -> list[Job]:
    """The jobs: the kernels' configs first, so that each backend is at its best when chosen."""
    names = args.family
    families = {op.family for op in OPS.values()}
    unknown = [n for n in names if n not in families and n not in OPS]
    if unknown:
        raise CliError(f"no family or op is called {unknown[0]!r}; there are {_list(families)}")
    ops = [op for op in OPS.values() if not names or op.family in names or op.name in names]
    mine = {op.family for op in ops}
    configs = [t for t in TUNABLES.values() if t.family in mine]
    if args.shapes:
        try:
            named = [shapes.parse(text) for text in args.shapes]
        except ValueError as error:
            raise CliError(f"--{error}") from None
        seen = [s for sizes in named for op in ops for s in shapes.of_shape(op, device, sizes)]
        if not seen:
            raise CliError(f"--shapes: no op takes {' '.join(args.shapes)}")
    else:
        seen = jobs.of_cases(ops, device)
    called: dict[str, set[tuple]] = {}
    if configs:  # what the calls ask for, and the samples unless calls are named
        called = jobs.sizes_of([s for s in seen if s.op.family in {t.family for t in configs}])
    if not args.shapes:
        for tunable in configs:
            called.setdefault(tunable.name, set()).update(tunable.samples)
    found = jobs.of_tunables(configs, device, threads, called)
    return [*found, *jobs.jobs_of(seen, device, threads)]


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


def _threads(args: argparse.Namespace, device: str) -> Sequence[int | None]:
    """Thread counts to tune for: each is a table of its own."""
    if torch.device(device).type != "cpu":
        return (None,)
    return [args.threads] if args.threads else sorted({torch.get_num_threads(), 1}, reverse=True)


def changes(found: Sequence[Change]) -> Table:
    """What is run otherwise now."""
    made = table("Changed", "what", "call", "before", "now", "faster", right=(4,))
    rows = sorted((c for c in found if c.changed), key=lambda c: -c.ratio)
    for change in rows[:_SHOWN]:
        made.add_row(
            change.name,
            escape(change.key),
            escape(str(change.before)),
            escape(str(change.after)),
            f"{change.ratio:.2f}x",
        )
    if len(rows) > _SHOWN:
        made.add_row(f"and {len(rows) - _SHOWN} more", "", "", "", "")
    return made


def ship(folder: Path, device: str, work: Sequence[Job]) -> Path:
    """Writes what is known of these jobs into a table of its own."""
    device = tables.device_name(device)
    known = tables.layers(device)
    kind = torch.device(device).type
    entries: store.Entries = {}
    for job in work:
        found = known.find(job.name, job.family, job.key, kind)
        if found is not None:
            entries.setdefault(job.name, {})[job.key] = found[0]
    path = folder / facts.file_name(device)
    store.merge(path, facts.facts(device), entries)
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    return path


def _model(args: argparse.Namespace) -> int:
    """Tunes what a model calls: `module:factory` gives (model, inputs)."""
    from fastllm.swap.tuning import tune

    model, inputs = load(args.model)
    console = output()
    with progress() as bars:
        bar = bars.add_task("tune", total=None)

        def tick(done: int, total: int, job: Job) -> None:
            bars.update(bar, total=total, completed=done, description=f"{job.name} {job.key}"[:60])

        found = tune(model, inputs, budget=args.budget, again=args.again, tick=tick)
    if found.changed:
        console.print(changes(found.changes))
    console.print(found.summary)
    return 0


def load(spec: str) -> tuple[torch.nn.Module, Any]:
    """(model, example inputs) from a factory that is named as module:function."""
    module, _, factory = spec.partition(":")
    if not module or not factory:
        raise CliError(f"--model: expected module:factory, found {spec!r}")
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise CliError(f"--model: {spec} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], torch.nn.Module):
        raise CliError(f"--model: {spec}() should return (model, example inputs)")
    return made


def _say(text: str) -> None:
    print(f"fastllm tune: {text}", file=sys.stderr)
