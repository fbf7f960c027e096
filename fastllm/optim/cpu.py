"""The optimizers on the CPU kernels: lists of tensors in, one call for all of them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm import _C

if TYPE_CHECKING:
    from fastllm.optim.work import Work

_C.optim_bind(Tensor, torch.nn.Parameter)
_threads = torch.get_num_threads
_is_neg = Tensor.is_neg


def run(kind: int, works: "list[Work]") -> "list[Work]":
    """Updates what the kernels can read; returns the rest, untouched."""
    if not works:
        return []
    works = list(map(resolved, works))
    odd = _C.optim_step(kind, [arguments(w) for w in works], _threads())
    if odd is None:
        return _done(works, [])
    # rare: other strides than the parameter's. Those that can be laid out alike are, once
    for work, i in places(works, odd):
        lay_out(work, i)
    odd = _C.optim_step(kind, [arguments(w) for w in works], _threads())
    if odd is None:
        return _done(works, [])
    left_out = {(id(work), i) for work, i in places(works, odd)}
    rest, fine = [], []
    for work in works:
        left = [i for i in range(len(work.params)) if (id(work), i) in left_out]
        good = [i for i in range(len(work.params)) if (id(work), i) not in left_out]
        rest += [work.only(left)] if left else []
        fine += [work.only(good)] if good else []
    if fine and _C.optim_step(kind, [arguments(w) for w in fine], _threads()) is not None:
        raise RuntimeError("tensors changed during an optimizer's step")
    return _done(fine, rest)


def run_all(kind: int, groups: list[tuple[Any, ...]], state: dict[Any, Any]) -> bool:
    """Updates groups of (settings, parameters, names of their states, number of the first).

    False, and nothing is done, where a state is to begin or a tensor is not an ordinary one. Names
    are three of states, two of scales, the master copy's and the step's, or None.
    """
    groups = [
        (tuple(map(float, settings)), params, (None, None, None, *names, None, None), first)
        for settings, params, names, first in groups
    ]
    done = _C.optim_step_all(kind, groups, state, _threads())
    if done is None:
        return False
    torch.autograd.graph.increment_version(done)
    return True


def _done(works: "list[Work]", rest: "list[Work]") -> "list[Work]":
    """Tells autograd what was written in place."""
    for work in works:
        torch.autograd.graph.increment_version(work.params)
    return rest


def arguments(work: "Work") -> tuple[Any, ...]:
    """A group as csrc/bindings/optim.cpp reads it."""
    lists = [*work.states, None, None, None][:3]
    scales = [*work.scales, None, None][:2]
    return (
        tuple(map(float, work.settings)), work.params, work.grads, *lists, *scales, work.masters,
        work.steps, work.fresh, work.numbers,
    )  # fmt: skip


def resolved(work: "Work") -> "Work":
    """Lazy negations made real: the bytes have to be the values."""
    if not any(map(_is_neg, work.grads)):
        return work
    return work._replace(grads=[g.resolve_neg() for g in work.grads])


def places(works: "list[Work]", odd: list[int]) -> Any:
    """(work, place in it) of numbers counted through all works."""
    flat = [(work, i) for work in works for i in range(len(work.params))]
    return [flat[n] for n in odd]


def lay_out(work: "Work", i: int) -> None:
    """Gives the gradient, and states from a checkpoint, the memory order of the parameter."""
    param, grad = work.params[i], work.grads[i]
    if grad.is_sparse:
        raise RuntimeError(f"{work.who} does not support sparse gradients")
    if grad.stride() != param.stride():
        work.grads[i] = torch.empty_like(param).copy_(grad)
    for name, each in zip(work.names, work.states, strict=True):
        state = each[i]
        plain = state.dtype in (torch.float32, torch.bfloat16)
        ours = work.own[i].get(name) is state  # and not the shard of a DTensor
        if plain and ours and state.shape == param.shape and state.stride() != param.stride():
            made = torch.empty_like(param, dtype=state.dtype).copy_(state)
            each[i] = work.own[i][name] = made
