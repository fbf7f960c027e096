"""fastllm.tune(model, inputs): measures what a model really calls."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastllm.core.run import as_calls, preserved, run
from fastllm.core.tuner import follow, jobs, search, table
from fastllm.core.tuner.search import Change, Job
from fastllm.core.tuner.tunable import TUNABLES

Tick = Callable[[int, int, Job], Any]


@dataclass
class Tuned:
    """What tuning found: one Change for each call that was measured. Printing it gives a list."""

    changes: list[Change] = field(default_factory=list)
    known: int = 0
    left: int = 0
    seconds: float = 0.0

    @property
    def changed(self) -> list[Change]:
        """What is run otherwise now."""
        return [c for c in self.changes if c.changed]

    @property
    def summary(self) -> str:
        """One line."""
        text = (
            f"measured {len(self.changes)} calls in {self.seconds:.1f} s, {self.known} were known"
        )
        text += f", {self.left} are left for another run" if self.left else ""
        return f"{text}; {len(self.changed)} are run otherwise now"

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        lines = [
            f"  {c.name} {c.key}: {c.before} -> {c.after}, {c.ratio:.2f}x" for c in self.changed
        ]
        return "\n".join([self.summary, *lines])


def tune(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: float | None = None,
    again: bool = False,
    tick: Tick = lambda done, total, job: None,
) -> Tuned:
    """Measures which backend and which config wins for the calls that this model makes.

    model           one that calls fastllm's ops: swapped, or built of fastllm.nn
    example_inputs  a tensor, a tuple of arguments, a dict of keyword arguments, or a list of such;
                    each is run without gradients and, if a parameter wants one, with, and nothing
                    of it stays in the model
    budget          seconds for measuring at most; a later call goes on where this one ended
    again           measures what is known already, too

    What wins is used from now on and kept for the next process. With torch.distributed, every rank
    must call it: rank 0 measures, all follow. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if table.MODE == "off":
        raise ValueError("FASTLLM_TUNE: expected cached or on, found off: no table would be used")
    calls = as_calls(example_inputs, "example_inputs")
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    device = next((table.device_name(p.device) for p in inner.parameters()), "cpu")
    return follow.decided_by_first(device, lambda: _tune(inner, calls, budget, again, tick))


def _tune(model: nn.Module, calls: list, budget: float | None, again: bool, tick: Tick) -> Tuned:
    gradients = any(p.requires_grad for p in model.parameters())

    def once() -> None:
        for call in calls:
            run(model, call, gradients)

    with preserved(model):
        seen = jobs.record(once)
    if not seen.devices:
        raise ValueError(
            "model: it calls none of fastllm's ops; put them in with fastllm.swap(model)"
        )
    work = [job for device in seen.devices for job in _jobs(seen, device)]
    found = Tuned(known=0 if again else sum(job.known is not None for job in work))
    begin, done = time.monotonic(), iter(range(len(work)))
    found.changes = list(
        search.search(work, budget, again=again, tick=lambda job: tick(next(done), len(work), job))
    )
    found.seconds = time.monotonic() - begin
    found.left = len(work) - found.known - len(found.changes)
    return found


def _jobs(seen: jobs.Seen, device: str) -> list[Job]:
    """Configs first: a backend is judged at its best. Those of calls that took torch, too."""
    families = {t.family for t in TUNABLES.values()}
    sizes = jobs.sizes_of([s for s in seen.on(device) if s.op.family in families])
    for name, found in seen.sizes.get(device, {}).items():
        sizes.setdefault(name, set()).update(found)
    configs = jobs.of_tunables(TUNABLES.values(), device, seen=sizes)
    return [*configs, *jobs.jobs_of(seen.on(device), device)]
