"""What a backend is, and which one the caller asked for."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BACKENDS = ("cpu", "onednn", "triton", "cuda", "torch", "reference")  # in order of preference


def always(*_: Any) -> None:
    """No reason against it: the `supports` or `available` of a backend that always serves."""
    return None


@dataclass(frozen=True, eq=False)
class Backend:
    """One implementation of one op.

    `forward(*args)` takes the op's resolved arguments. `backward(*grads, *saved, needs)` returns
    the gradients in the op's order, None where not needed; a backend without one is *composite*:
    plain torch code that torch differentiates by itself. `supports(*args)` and `available()` return
    None, or the reason why this call, or any call on this machine, cannot be served.
    `fast(*args)`, if there is one, is the same forward for ordinary calls only (see fast.py).
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    supports: Callable[..., str | None] = always
    available: Callable[[], str | None] = always
    fast: Callable[..., Any] | None = None

    @functools.cached_property
    def missing(self) -> str | None:
        """Why this machine cannot run the backend at all, asked once."""
        return self.available()


def check_name(name: str | None, argument: str = "backend") -> str | None:
    """`name` itself; ValueError when it is neither None, "auto" nor a known backend."""
    if name is None or name == "auto":
        return None
    if name not in BACKENDS:
        raise ValueError(
            f"{argument}: expected one of {', '.join(BACKENDS)} or 'auto', found {name!r}"
        )
    return name


_ENVIRONMENT = check_name(os.environ.get("FASTLLM_BACKEND") or None, "FASTLLM_BACKEND")


class _Choice(threading.local):
    """The backend in force in this thread. Not a ContextVar: torch.compile cannot trace one."""

    name: str | None = _ENVIRONMENT


choice = _Choice()


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block, every op runs on this backend ("auto" or None: the best one).

    A call that the backend cannot serve raises `fastllm.UnsupportedError`. An explicit `backend=`
    of a call goes before the block, the block before the environment's FASTLLM_BACKEND.
    """
    before, choice.name = choice.name, check_name(name)
    try:
        yield
    finally:
        choice.name = before
