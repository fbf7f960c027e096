"""What the bench times: a registry that ops join by themselves, and everything else by hand.

An `Op` needs nothing. What is no op (an optimizer's step, a module, a training step) registers:

    def trial(device, direction):  # "step"
        p, g = tensors(device)
        return Trial(
            ours=lambda: lambda i: ours.step(),
            stock={
                "eager": lambda: lambda i: plain.step(),
                "fused": lambda: lambda i: fused.step(),
            },
            nbytes=28 * p.numel(),
            flops=12 * p.numel(),
        )

    register(Subject("adamw", "optim", (Scenario("48M-fp32", torch.float32, 1344 << 20, trial),)))

in a module `subjects.py` of its layer (`fastllm/optim/subjects.py`), which only the bench imports.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch

from fastllm.core.measure import Factory

LAYERS = ("nn", "optim", "quant", "swap")  # that may have a subjects.py

SUBJECTS: dict[str, "Subject"] = {}


@dataclass(frozen=True)
class Trial:
    """One scenario in one direction, ready to be timed.

    A `Factory` makes the call to be timed (`call(i)` uses input set i of `sets`); it runs once,
    outside the clock, and may raise to say why that candidate is absent.

    ours      what a user gets from fastllm
    stock     stock PyTorch by the name of the setting: "eager" (plain, required), "fused", ...
    compiled  under torch.compile, by name ("compiled"): seconds to make, so first to be left out
    peers     other projects, by package name
    nbytes    the least bytes that have to move; flops: the least floating point operations
    sets      input sets; 1 where the inputs stay in the cache, unless `cold` says they outgrow it
    backend   what ours runs on, for the table
    counts    whose arithmetic the operations are, where they are not the scenario's dtype's
    """

    ours: Factory
    stock: Mapping[str, Factory]
    nbytes: int
    flops: int = 0
    compiled: Mapping[str, Factory] = field(default_factory=dict)
    peers: Mapping[str, Factory] = field(default_factory=dict)
    sets: int = 1
    cold: bool = False
    backend: str = "cpu"
    counts: torch.dtype | None = None


@dataclass(frozen=True)
class Scenario:
    """One shape and dtype of a subject.

    `nbytes` is about what a call moves (or a tenth of its operations, where that is more): it
    orders scenarios and picks the quick ones. `wrong` proves ours on a device: the first failure
    in words, or None; asked before anything is timed.
    """

    name: str
    dtype: torch.dtype
    nbytes: int
    trial: Callable[[str, str], Trial]
    wrong: Callable[[str], str | None] = lambda device: None


@dataclass(frozen=True)
class Subject:
    """Something that is timed: a name, the family it is shown with, its scenarios, its directions.

    The last of `directions` is the one that counts most; `quick` those that a quick run times.
    """

    name: str
    family: str
    scenarios: Sequence[Scenario]
    directions: tuple[str, ...] = ("step",)
    quick: tuple[str, ...] | None = None


def register(subject: Subject) -> Subject:
    """Adds a subject; ValueError when its name is taken or it has no scenario."""
    if subject.name in SUBJECTS:
        raise ValueError(f"name: a subject {subject.name!r} is registered already")
    if not subject.scenarios:
        raise ValueError(f"scenarios: {subject.name!r} has none")
    SUBJECTS[subject.name] = subject
    return subject


def load() -> dict[str, Subject]:
    """All that is registered, after importing the layers' own `subjects` modules."""
    for layer in LAYERS:
        name = f"fastllm.{layer}.subjects"
        if find_spec(f"fastllm.{layer}") and find_spec(name):
            importlib.import_module(name)
    return SUBJECTS
