"""The timing engine: candidates against one another, in one run. Knows no op.

A figure is a ratio. Candidates take turns within a round, in an order that changes from round to
round, and their inputs rotate past the last-level cache; what is reported are medians over rounds
of quotients within a round, so that a machine that slows down slows all candidates down. What a
call returns is dropped while the clock runs: who allocates pays for it, who recycles memory gains.
"""

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

Call = Callable[[int], Any]  # call(i): one call on input set i
Factory = Callable[[], Call]  # makes the call, under the thread count that it is timed with

MAX_SETS = 512  # input sets beyond this are not worth their memory: the row is *warm*
_FEWEST, _PATIENCE = 3, 10  # rounds that do when `min_rounds` take ten times the budget
_SAMPLE = 5e-4  # seconds that one sample lasts at least
_DEFAULT_CACHE = 64 << 20


@dataclass(frozen=True)
class Ratio:
    """A quotient: the median over rounds, and the quartiles."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}x"


@dataclass(frozen=True)
class Measurement:
    """Seconds a call: `samples[name][r]` is candidate `name` in round r, on input set `sets[r]`.

    `sets` is of use when rounds are paired; `failed` says why a candidate is absent from `samples`.
    """

    samples: dict[str, list[float]]
    sets: list[int] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """How often each candidate was timed."""
        return len(self.sets)

    def seconds(self, name: str) -> float:
        """Median seconds a call."""
        return median(self.samples[name])

    def spread(self, name: str) -> float:
        """Distance between the quartiles, as a share of the median."""
        low, middle, high = quartiles(self.samples[name])
        return (high - low) / middle if middle else 0.0

    def speedup(self, name: str, over: str) -> Ratio:
        """How many times faster `name` is than `over`."""
        pairs = zip(self.samples[over], self.samples[name], strict=True)
        low, middle, high = quartiles([theirs / ours for theirs, ours in pairs])
        return Ratio(middle, low, high)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, linear between neighbours."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.25), at(0.5), at(0.75)


def interleave(
    candidates: Mapping[str, Factory],
    *,
    sets: int = 1,
    device: str | torch.device = "cpu",
    budget: float = 1.0,
    threads: int | None = None,
    min_rounds: int = 7,
    max_rounds: int = 400,
    stable: float = 0.01,
    clear: float = math.inf,
    paired: bool = False,
    graphs: bool = True,
    tick: Callable[[float], None] | None = None,
) -> Measurement:
    """Times every candidate in interleaved rounds.

    Each factory is called once and its call warmed up, outside the clock. Rounds go on until the
    ratios to the first candidate are known to `stable` (relative standard error) or are `clear`
    such errors away from 1, or `budget` seconds have gone by and `min_rounds` are done; where these
    would take ten times the budget, three have to do. Input sets rotate with every call; when
    `paired`, a round is one call of each candidate on the same set. A candidate that raises while
    it is made or warmed up is left out, with its reason in `failed`.

    On a CUDA device, each sample is a CUDA graph that holds one call per input set, timed by events
    (plain events where a call cannot be captured, or when `graphs` is false). The thread count is
    restored afterwards. `tick` is told the share of the budget that is spent.
    """
    if sets < 1:
        raise ValueError(f"sets: expected at least 1, found {sets}")
    clock = _CudaClock(device, graphs) if torch.device(device).type == "cuda" else _CpuClock()
    clocks: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with thread_count(threads), _no_collector():
        for name, factory in candidates.items():
            try:
                clocks[name] = clock.prepare(factory(), sets, paired)
            except Exception as error:
                failed[name] = one_line(error)
        samples: dict[str, list[float]] = {name: [] for name in clocks}
        visited = _rounds(
            clocks, samples, sets, budget, min_rounds, max_rounds, (stable, clear), paired, tick
        )
    return Measurement(samples, visited, failed)


def _rounds(
    clocks: Mapping[str, Any],
    samples: dict[str, list[float]],
    sets: int,
    budget: float,
    min_rounds: int,
    max_rounds: int,
    enough: tuple[float, float],
    paired: bool,
    tick: Callable[[float], None] | None,
) -> list[int]:
    order, shuffle = list(clocks), random.Random(0).shuffle
    visited: list[int] = []
    cursor, begin = 0, time.perf_counter()
    while order and len(visited) < max_rounds:
        spent = time.perf_counter() - begin
        if tick:
            tick(min(spent / budget, 1.0) if budget else 1.0)
        done = len(visited)
        # `paired` rounds cover every set equally often, or the sum over sets would be lopsided
        whole = not paired or done % sets == 0
        if whole and done >= min_rounds and (spent >= budget or _settled(samples, *enough)):
            break
        if whole and done >= _FEWEST and spent >= _PATIENCE * budget > 0:
            break
        shuffle(order)
        visited.append(cursor % sets)
        for name in order:
            seconds, calls = clocks[name](cursor)
            samples[name].append(seconds)
            cursor += 0 if paired else calls
        cursor += int(paired)
    if tick:
        tick(1.0)
    return visited


def _settled(samples: dict[str, list[float]], stable: float, clear: float) -> bool:
    """Whether every ratio to the first candidate is known to `stable`, or `clear` errors from 1."""
    first, *others = samples.values()
    for other in others or [[1.0] * len(first)]:
        low, middle, high = quartiles([a / b for a, b in zip(first, other, strict=True)])
        # if normal: quartiles are 1.35 sigma apart, a median's error is 1.25 sigma / sqrt(n)
        error = 0.93 * (high - low) / middle / math.sqrt(len(first))
        if error > stable and abs(math.log(middle)) < clear * error:
            return False
    return True


class _CpuClock:
    """Wall clock around enough calls to be read reliably."""

    def prepare(self, call: Call, sets: int, paired: bool) -> Callable[[int], tuple[float, int]]:
        """Warms the call up and returns the function that takes one sample from a given set on."""
        call(0)  # compiles, tunes, touches memory for the first time
        call(1 % sets)
        number = 1 if paired else self._enough(call, sets)
        order = [i % sets for i in range(sets + number)]
        if number == 1:
            return functools.partial(_time_one, call, sets)
        return functools.partial(_time_many, call, sets, number, order)

    def _enough(self, call: Call, sets: int) -> int:
        """Calls a sample needs. The fastest of a few counts: a slow one may be a hiccup."""
        best = min(_time_one(call, sets, i)[0] for i in range(3))
        return min(max(1, math.ceil(_SAMPLE / max(best, 1e-7))), 10_000)


def _time_one(call: Call, sets: int, cursor: int) -> tuple[float, int]:
    index = cursor % sets
    start = time.perf_counter()
    call(index)
    return time.perf_counter() - start, 1


def _time_many(
    call: Call, sets: int, number: int, order: Sequence[int], cursor: int
) -> tuple[float, int]:
    first = cursor % sets
    turn = order[first : first + number]
    start = time.perf_counter()
    for index in turn:
        call(index)
    return (time.perf_counter() - start) / number, number


class _CudaClock:
    """Events around replays of a CUDA graph, which hides what the launches cost the host."""

    def __init__(self, device: str | torch.device, graphs: bool) -> None:
        self.device, self.graphs = torch.device(device), graphs

    def prepare(self, call: Call, sets: int, paired: bool) -> Callable[[int], tuple[float, int]]:
        """Warms the call up on a side stream, as capturing asks for, and captures it if it can."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for i in range(3):
                call(i % sets)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        torch.cuda.synchronize(self.device)
        if self.graphs and not paired:
            try:
                return self._graph(call, sets)
            except RuntimeError:
                torch.cuda.synchronize(self.device)
        return functools.partial(self._events, call, sets, 1 if paired else sets)

    def _graph(self, call: Call, sets: int) -> Callable[[int], tuple[float, int]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(sets):
                call(i)
        replays = max(1, math.ceil(_SAMPLE / max(self._elapsed(graph.replay, 3), 1e-6)))
        return lambda cursor: (self._elapsed(graph.replay, replays) / sets, replays * sets)

    def _events(self, call: Call, sets: int, number: int, cursor: int) -> tuple[float, int]:
        turn = iter([(cursor + i) % sets for i in range(number)])
        return self._elapsed(lambda: call(next(turn)), number), number

    def _elapsed(self, run: Callable[[], Any], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """Sets torch's thread count within the block; None leaves it alone."""
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collector() -> Iterator[None]:
    """Python's cycle collector would bill one candidate for everybody's garbage.

    Young garbage goes before; going through the old objects takes 0.1 s, more than a measurement.
    """
    enabled = gc.isenabled()
    gc.collect(1)
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def last_level_cache(device: str | torch.device = "cpu") -> int:
    """Bytes of the largest cache that inputs could stay in; an estimate where nothing tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size or _DEFAULT_CACHE
    return _cpu_cache()


@functools.cache
def _cpu_cache(root: str = "/sys/devices/system/cpu/cpu0/cache") -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = [0]
    for path in Path(root).glob("index*/size"):
        try:
            text = path.read_text().strip()
            found.append(int(text[:-1]) * units[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(found) or _DEFAULT_CACHE


def rotation(nbytes: int, device: str | torch.device = "cpu") -> int:
    """Input sets of `nbytes` each so that every set is cold when its turn comes; 1: stay warm."""
    sets = math.ceil(2 * last_level_cache(device) / max(nbytes, 1)) + 1
    return sets if sets <= MAX_SETS else 1


def size_of(values: Any) -> int:
    """Bytes of the tensors in a nest of tuples and lists."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size()
    return sum(size_of(v) for v in values) if isinstance(values, tuple | list) else 0


def copies(args: tuple, sets: int) -> list[tuple]:
    """`args` and `sets - 1` deep copies of it, with layouts and requires_grad kept."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        return type(value)(copy(v) for v in value) if isinstance(value, tuple | list) else value

    return [args, *(copy(args) for _ in range(sets - 1))]


def one_line(error: BaseException, width: int = 160) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
    return text if len(text) <= width else text[: width - 3] + "..."
