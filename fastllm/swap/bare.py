"""What all probes share: throwaway copies of modules, and a place to run them in."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

_NOT_COPIED = ("forward", "_old_forward", "_hf_hook")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def bare(module: nn.Module, training: bool, cls: type | None = None) -> Any:
    """A copy that shares values, not containers, with `module`, and has none of its hooks."""
    twin: Any = object.__new__(cls or type(module))
    for name, value in vars(module).items():
        if name not in _NOT_COPIED:
            vars(twin)[name] = value.copy() if isinstance(value, dict) else value
    for name in _HOOKS:
        vars(twin)[name].clear()
    vars(twin)["training"] = training
    return twin


@contextlib.contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, no warnings, random numbers that nobody else's depend on.

    One thread: everything here is tiny, and more would only wait for each other.
    """
    threads = torch.get_num_threads()
    with (
        contextlib.ExitStack() as last,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about dtype pairs that nobody asked for
        last.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        yield


def only_argument(cls: Any) -> str | None:
    """The name of forward's argument, if it takes exactly one by position."""
    wanted = list(inspect.signature(cls.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return wanted[0].name if len(wanted) == 1 and wanted[0].kind in kinds else None


def state(twin: Any) -> list[tuple[str, int]]:
    """Two of these are equal when no attribute was set in between."""
    return [(name, id(value)) for name, value in vars(twin).items()]


def rename_argument(function: Any, name: str, base: type) -> FunctionType:
    """`function` with its second parameter called `name`: callers may pass it by keyword."""
    code: CodeType = function.__code__
    names = (code.co_varnames[0], name, *code.co_varnames[2:])
    made = FunctionType(
        code.replace(co_varnames=names),
        function.__globals__,
        "forward",
        function.__defaults__,
        function.__closure__,
    )
    made.__qualname__ = f"{base.__qualname__}.forward"
    return made
