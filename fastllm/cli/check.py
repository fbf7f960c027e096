"""`fastllm check`: every op x backend x case that this machine can run, against float64."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from fastllm import _C
from fastllm.cli.app import CliError
from fastllm.cli.console import output, progress, table
from fastllm.core.backend import BACKENDS
from fastllm.core.cases import Case
from fastllm.core.measure import one_line, thread_count
from fastllm.core.op import OPS, Op
from fastllm.core.proof import Proof, standard

YARDSTICK = "torch"  # sets the budget: checking it against itself would prove nothing


@dataclass
class Result:
    """What became of one op on one backend; for the CPU kernels, on one instruction set level."""

    op: str
    backend: str
    proved: int = 0
    declined: dict[str, int] = field(default_factory=dict)
    worst: Proof | None = None
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, proof: Proof) -> None:
        """Counts one proof in."""
        self.proved += 1
        if not proof.ok:
            self.failures.append(proof.message)
        if self.worst is None or _use(proof) > _use(self.worst):
            self.worst = proof


def run(args: argparse.Namespace) -> int:
    """Checks what was asked for; 1 when something exceeds its budget."""
    ops = choose(args.op)
    if args.backend not in (None, *BACKENDS):
        raise CliError(f"--backend: expected one of {', '.join(BACKENDS)}, found {args.backend!r}")
    if args.backend == YARDSTICK:
        raise CliError(
            f"--backend {YARDSTICK}: stock PyTorch is the yardstick, not what is checked"
        )
    console = output()
    results, absent = [], {}
    with thread_count(args.threads or min(2, torch.get_num_threads())), progress() as bars:
        bar = bars.add_task("check", total=None)
        work = [(op, select(op.cases, args.exhaustive)) for op in ops]
        bars.update(bar, total=sum(len(cases) for _, cases in work))
        for op, cases in work:
            bars.update(bar, description=op.name)
            jobs = list(plan(op, args.backend))
            absent.update({job.label: job.missing for job in jobs if job.missing})
            jobs = [job for job in jobs if not job.missing]
            results += check(jobs, cases, lambda: bars.advance(bar))
    console.print(_table(results))
    for name, reason in absent.items():
        console.print(f"  {name}: {reason}", style="dim", markup=False)
    _notes(console, results)
    failed = sum(len(r.failures) for r in results)
    total = sum(r.proved for r in results)
    if not total:
        raise CliError("nothing could be checked: no backend that was asked for can run here")
    words = f"{failed} of {total} cases exceed" if failed else f"all {total} cases keep"
    console.print(f"{words} the error budget", style="bold red" if failed else "bold green")
    return 1 if failed else 0


def choose(names: Iterable[str]) -> list[Op]:
    """The ops of these names; all of them when there are none."""
    names = list(names)
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise CliError(f"no op is called {unknown[0]!r}; there are {', '.join(OPS)}")
    return [OPS[name] for name in names or OPS]


def select(cases: Sequence[Case], exhaustive: bool) -> list[Case]:
    """All cases, or all that are not merely large ones for the bench."""
    return [c for c in cases if exhaustive or "bench" not in c.tags or "quick" in c.tags]


@dataclass(frozen=True)
class Job:
    """One op on one backend; `level` is the instruction set level to force, if any."""

    op: Op
    backend: str
    level: str | None = None

    @property
    def missing(self) -> str | None:
        """Why the backend cannot run on this machine at all."""
        return self.op.backends[self.backend].missing

    @property
    def label(self) -> str:
        """The backend as the table names it."""
        return f"{self.backend} ({self.level})" if self.level else self.backend


def plan(op: Op, backend: str | None = None) -> Iterator[Job]:
    """What there is to check of an op, on all its backends or on one."""
    for name in op.backends:
        if name == YARDSTICK or backend not in (None, name):
            continue
        levels: Sequence[str | None] = [None]
        if name == "cpu" and op.backends[name].missing is None:
            levels = _C.isa_levels()
        for level in levels:
            yield Job(op, name, level)


def check(
    jobs: Sequence[Job], cases: Iterable[Case], tick: Callable[[], Any] = lambda: None
) -> list[Result]:
    """Proves, for each job of one op, the cases that it serves, on every device that it serves."""
    results = [Result(job.op.name, job.label) for job in jobs]
    for case in cases:
        declined = [_check_case(jobs, results, case, device) for device in devices()]
        for result, *reasons in zip(results, *declined, strict=True):
            if all(reasons):
                result.declined[reasons[0]] = result.declined.get(reasons[0], 0) + 1
        tick()
    return results


def _check_case(
    jobs: Sequence[Job], results: Sequence[Result], case: Case, device: str
) -> list[str | None]:
    """Adds each job's proof to its result; why the jobs that decline the case do."""
    args, held, declined = case.args(device), None, []
    for job, result in zip(jobs, results, strict=True):
        with _isa(job.level) if job.level else nullcontext():
            declined.append(reason := job.op.why_not(job.backend, args))
            if reason is not None:
                continue
            try:
                held = held or standard(job.op, case, device)
                proof = held.prove(job.backend)
            except Exception as error:  # a crash fails this case, it does not end the check
                proof = Proof(False, math.inf, 0.0, f"{job.op.name} {case.name}: {one_line(error)}")
            result.add(case, proof)
    return declined


def devices() -> list[str]:
    """Devices to check on."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@contextmanager
def _isa(level: str) -> Iterator[None]:
    before = _C.isa()
    _C.set_isa(level)
    try:
        yield
    finally:
        _C.set_isa(before)


def _use(proof: Proof) -> float:
    """The share of its budget that a proof uses up."""
    if proof.error == 0:
        return 0.0
    return proof.error / proof.budget if proof.budget else math.inf


def _table(results: Sequence[Result]) -> Table:
    columns = ("op", "backend", "cases", "declined", "worst error", "its budget", "used", "")
    made = table("Error against float64", *columns, right=(2, 3, 4, 5, 6))
    last = None
    for r in results:
        if last not in (None, r.op):
            made.add_section()
        worst = r.worst
        made.add_row(
            r.op if r.op != last else "",
            r.backend,
            str(r.proved),
            str(sum(r.declined.values()) or ""),
            f"{worst.error:.1e}" if worst else "",
            f"{worst.budget:.1e}" if worst else "",
            f"{_use(worst):.0%}" if worst and math.isfinite(_use(worst)) else "",
            _verdict(r),
        )
        last = r.op
    return made


def _verdict(r: Result) -> str:
    if r.failures:
        return f"[bold red]{len(r.failures)} failed[/]"
    return "[green]ok[/]" if r.proved else "[yellow]nothing served[/]"


def _notes(console: Any, results: Sequence[Result]) -> None:
    reasons: dict[str, int] = {}
    for r in results:
        for reason, count in r.declined.items():
            key = f"{r.backend.split()[0]}: {reason}"
            reasons[key] = reasons.get(key, 0) + count
    for reason, count in reasons.items():
        console.print(f"  declined {count}x, {escape(reason)}", style="dim")
    for r in results:
        for message in r.failures:
            console.print(f"  failed on {r.backend}: {escape(message)}", style="red")
