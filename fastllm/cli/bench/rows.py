"""Measures: one row for each op, case, direction and thread count, proven before it is timed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fastllm.cli.bench import peers
from fastllm.cli.bench.subject import DIRECTIONS, Subject, bound, stock
from fastllm.core.cases import Case
from fastllm.core.limits import copying
from fastllm.core.measure import Measurement, interleave, one_line
from fastllm.core.op import Op
from fastllm.core.proof import prove

OURS, EAGER, COMPILED, COPY = "fastllm", "eager", "compiled", "copy"
TIE = 0.03  # closer to 1 than this, a ratio is called even


@dataclass
class Row:
    """One measured row. Ratios say how many times faster ours is: median, lower, upper quartile."""

    op: str
    family: str
    case: str
    dtype: str
    direction: str
    threads: int | None
    backend: str
    nbytes: int
    warm: bool
    rounds: int = 0
    microseconds: dict[str, float] = field(default_factory=dict)
    speedup: dict[str, list[float]] = field(default_factory=dict)
    limit_share: float | None = None
    absent: dict[str, str] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def rivals(self) -> dict[str, float]:
        """Ratios to everything that is a way to run the op: the copy is a limit, not a rival."""
        return {name: x[0] for name, x in self.speedup.items() if name != COPY}

    @property
    def losses(self) -> list[str]:
        """What is faster than ours by more than a tie."""
        return [name for name, x in self.rivals.items() if x < 1 - TIE]

    def json(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self) | {"losses": self.losses}


@dataclass(frozen=True)
class Settings:
    """How to measure: seconds a row, whether to compile, how many threads (None: a GPU)."""

    device: str = "cpu"
    budget: float = 1.0
    compile: bool = True
    directions: Sequence[str] = DIRECTIONS


class Correctness:
    """Proves what is about to be timed, once: no speedup is printed for what fails its cases."""

    def __init__(self, device: str, tick: Callable[[str], Any] = lambda what: None) -> None:
        self.device, self.tick = device, tick
        self._known: dict[tuple[str, str], str | None] = {}

    def wrong(self, op: Op, backend: str, case: Case) -> str | None:
        """The first failure of the op's untimed cases and of this one on `backend`, or None."""
        key = (op.name, backend)
        if key not in self._known:
            self.tick(f"proving {op.name} on {backend}")
            others = [c for c in op.cases if "bench" not in c.tags]
            self._known[key] = self._first_failure(op, backend, others)
        return self._known[key] or self._first_failure(op, backend, [case])

    def _first_failure(self, op: Op, backend: str, cases: Sequence[Case]) -> str | None:
        for case in cases:
            if op.why_not(backend, case.args(self.device)) is not None:
                continue
            try:
                proof = prove(op, case, backend, self.device)
            except Exception as error:
                return f"{op.name} {case.name}: {one_line(error)}"
            if not proof.ok:
                return proof.message
        return None


def measure_case(
    op: Op,
    case: Case,
    threads: int | None,
    settings: Settings,
    correctness: Correctness,
    tick: Callable[[str], Any] = lambda what: None,
) -> list[Row]:
    """The rows of one case: one a direction."""
    backend = op.select(case.args(settings.device)).name
    wrong = correctness.wrong(op, backend, case)
    rows = []
    for direction in settings.directions:
        tick(f"{op.name} {case.name} {direction}")
        rows.append(_row(op, case, direction, backend, wrong, threads, settings))
    return rows


def _row(
    op: Op,
    case: Case,
    direction: str,
    backend: str,
    wrong: str | None,
    threads: int | None,
    settings: Settings,
) -> Row:
    subject = Subject(op, case, settings.device, direction)
    row = Row(
        op.name,
        op.family,
        case.name,
        str(case.dtype).removeprefix("torch."),
        direction,
        threads,
        backend,
        subject.nbytes,
        subject.warm,
        wrong=wrong,
    )
    if wrong:
        return row
    candidates = {
        OURS: subject.ours(),
        EAGER: subject.candidate(stock(op)),
        COPY: copying(subject.nbytes, settings.device),
    }
    # a compiled graph's backward cannot be run twice: its buffers are donated
    if settings.compile and direction != "backward":
        candidates[COMPILED] = subject.compiled(stock(op))
    for name, load in peers.installed(op.name, settings.device).items():
        candidates[name] = _loaded(subject, load)
    found = interleave(
        candidates,
        sets=subject.sets,
        device=settings.device,
        budget=settings.budget,
        threads=threads,
    )
    return _fill(row, found)


def _loaded(subject: Subject, load: Callable[[], Callable[..., Any]]) -> Callable[[], Any]:
    return lambda: subject.candidate(load())()


def _fill(row: Row, found: Measurement) -> Row:
    row.rounds = found.rounds
    row.absent = dict(found.failed)
    row.microseconds = {name: _digits(found.seconds(name) * 1e6) for name in found.samples}
    if OURS not in found.samples:
        row.wrong = f"{row.op} {row.case}: {found.failed[OURS]}"
        return row
    for name in found.samples:
        if name != OURS:
            x = found.speedup(OURS, over=name)
            row.speedup[name] = [_digits(v) for v in (x.value, x.low, x.high)]
    # the copy moves as many bytes as the op has to: its time over ours is our share of its speed
    row.limit_share = row.speedup[COPY][0] if COPY in row.speedup else None
    return row


def measure_overhead(
    op: Op, case: Case, threads: int | None, settings: Settings
) -> dict[str, float | str]:
    """Microseconds a call on a tiny input: the public function, the backend, stock."""
    entry: dict[str, float | str] = {"op": op.name, "case": case.name}
    plain = Subject(op, case, settings.device, "forward")
    grad = Subject(op, case, settings.device, "forward+backward")
    direct = op.select(plain.args).forward
    tracked = grad.args
    ours, ours_grad = bound(op, plain.args), bound(op, tracked)
    theirs = stock(op)
    calls = {
        "no grad": ours,
        "no grad, backend direct": lambda: direct(*plain.args),
        "no grad, eager": lambda: theirs(*plain.args),
        "grad": ours_grad,
        "grad, eager": lambda: theirs(*tracked),
        "empty": lambda: None,
    }
    found = interleave(
        {name: _constant(call) for name, call in calls.items()},
        device="cpu",  # the host's clock on a GPU, too: this is about what a call costs the host
        budget=settings.budget,
        threads=threads,
    )
    if torch.device(settings.device).type == "cuda":
        torch.cuda.synchronize()
    nothing = found.seconds("empty")
    for name in found.samples:
        if name != "empty":
            entry[name] = _digits(max(found.seconds(name) - nothing, 0.0) * 1e6)
    return entry


def _constant(call: Callable[[], Any]) -> Callable[[], Callable[[int], Any]]:
    return lambda: lambda i: call()


def _digits(value: float) -> float:
    """Four significant digits: more would be noise in the stored file."""
    return float(f"{value:.4g}")
