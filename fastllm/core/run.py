"""Runs a model on given inputs, repeatably, and leaves it as it was."""

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

Call = tuple[tuple, dict[str, Any]]


def as_calls(inputs: Any, argument: str = "verify") -> list[Call]:
    """What `verify=` (or another argument) takes, as (args, kwargs) pairs.

    Batches that a DataLoader or a generator yields are taken, too; a list among them is a tuple of
    arguments.
    """
    calls: list[Call] = []
    single = isinstance(inputs, Tensor | Mapping | tuple | str) or not hasattr(inputs, "__iter__")
    for one in [inputs] if single else inputs:
        one = tuple(one) if isinstance(one, list) and not isinstance(inputs, list) else one
        if isinstance(one, Tensor):
            calls.append(((one,), {}))
        elif isinstance(one, Mapping):
            calls.append(((), dict(one)))
        elif isinstance(one, tuple):
            calls.append((one, {}))
        else:
            raise TypeError(
                f"{argument}: expected a tensor, a tuple of arguments, a dict of keyword arguments "
                f"or a list (or loader) of such, found {type(one).__name__}"
            )
    if not calls:
        raise ValueError(f"{argument}: the list of inputs is empty")
    return calls


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; after it, everything is as it was before.

    That is: train or eval mode of every module, attributes, buffers and their values, and the
    random states of torch, Python and numpy.
    """
    modules = list(model.modules())
    attributes = [dict(vars(m)) for m in modules]
    registered = [dict(m._buffers) for m in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    states = random.getstate(), numpy.random.get_state()
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            for module in modules:
                module.training = False
            yield
    finally:
        for module, before, names in zip(modules, attributes, registered, strict=True):
            now = vars(module)
            if list(now) != list(before) or any(now[k] is not v for k, v in before.items()):
                now.clear()
                now.update(before)
            if any(module._buffers.get(k) is not v for k, v in names.items()):
                module._buffers.clear()
                module._buffers.update(names)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def run(
    model: nn.Module,
    call: Call,
    gradients: bool,
    dtype: torch.dtype | None = None,
    like: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Floating outputs without gradients, with gradients, and the gradients, by name.

    dtype  what floating inputs are converted to
    like   an earlier result: upstream gradients are rounded to the dtypes of its outputs
    """
    results = {}
    with torch.no_grad():
        for name, value in _outputs(model, call, dtype)[0].items():
            results[f"output {name} (no grad)"] = value.detach()
    if not gradients:
        return results
    with torch.enable_grad():
        outputs, leaves = _outputs(model, call, dtype)
        wanted: dict[str, Tensor] = {
            f"gradient of {n}": p for n, p in model.named_parameters() if p.requires_grad
        }
        wanted |= {f"gradient of input {i}": leaf for i, leaf in enumerate(leaves)}
        upstream = {}
        for i, (name, value) in enumerate(outputs.items()):
            results[f"output {name}"] = value.detach()
            if value.requires_grad:
                random = torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
                rounded = (like or results)[f"output {name}"].dtype
                upstream[name] = random.to(value.device, rounded).to(value.dtype)
        if upstream:
            ends = [outputs[name] for name in upstream]
            grads = torch.autograd.grad(
                ends, list(wanted.values()), list(upstream.values()), allow_unused=True
            )
            found = zip(wanted, grads, strict=True)
            results.update({name: grad.detach() for name, grad in found if grad is not None})
    return results


def _outputs(
    model: nn.Module, call: Call, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    leaves: list[Tensor] = []
    args, kwargs = _fresh(call, dtype, leaves)
    torch.manual_seed(0)
    outputs: dict[str, Tensor] = {}
    flatten(model(*args, **kwargs), "", outputs)
    return outputs, leaves


def _fresh(value: Any, dtype: torch.dtype | None, leaves: list[Tensor]) -> Any:
    """A copy that the model may write to; tensors that want gradients are collected."""
    if isinstance(value, Tensor):
        made = value.detach().clone()
        if made.is_floating_point() and dtype is not None:
            made = made.to(dtype)
        if value.requires_grad:
            leaves.append(made.requires_grad_())
        return made
    if isinstance(value, Mapping):
        return {k: _fresh(v, dtype, leaves) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(v, dtype, leaves) for v in value)
    return copy.deepcopy(value)


def flatten(value: Any, name: str, into: dict[str, Tensor]) -> None:
    """Floating tensors of nested tuples, dicts and dataclasses, by a readable name."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            into[name or "0"] = value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = vars(value).items()
    for key, item in items:
        flatten(item, f"{name}.{key}" if name else str(key), into)
