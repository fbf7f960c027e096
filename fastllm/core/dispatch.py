"""Registers an op with torch's dispatcher: `torch.ops.fastllm.<name>` and `<name>_backward`.

define/impl costs a quarter of `custom_op` per call. The dispatcher ops carry the chosen backend's
name as their last argument, so that a compiled graph keeps the choice in force when it was traced.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.op import Op
from fastllm.core.tuner import routes

LIBRARY = torch.library.Library("fastllm", "DEF")


def define(
    name: str, backends: Iterable[Backend], reference: Any, *, kind: type[Op] = Op, **facts: Any
) -> Op:
    """Registers the op `name` that `backends` serve, and `reference.<name>` in any case.

    The module `reference` has `<name>` and `<name>_backward`. `facts` are the op's other fields;
    unless they say otherwise, backward is given the forward arguments.
    """
    plain, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    outputs = facts.get("outputs", 1)

    def visible(*args: Any) -> Any:
        results = plain(*args)
        return results[0] if outputs == 1 else results[:outputs]

    facts.setdefault("saved", lambda args, results: args)
    op = kind(
        name=name,
        reference=visible if facts.get("hidden") else plain,
        reference_backward=backward,
        implementations=[*backends, Backend("reference", plain, backward)],
        **facts,
    )
    return register(op)


def register(op: Op) -> Op:
    """Defines the dispatcher ops of `op`, with fake kernels, autograd and autocast."""
    name = f"fastllm::{op.name}"
    schema = op.schema
    LIBRARY.define(f"{op.name}({schema.params}, str? backend) -> {schema.returns}")
    LIBRARY.define(
        f"{op.name}_backward({schema.backward_params}, bool[] needs, str? backend)"
        f" -> {schema.backward_returns}"
    )
    LIBRARY.impl(op.name, _forward(op), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{op.name}_backward", _backward(op), "CompositeExplicitAutograd")
    torch.library.register_fake(name, _fake(op), lib=LIBRARY)
    torch.library.register_fake(f"{name}_backward", _fake_backward(op), lib=LIBRARY)
    _register_autograd(op, name)
    for device, dtype in op.autocast.items():
        torch.library.register_autocast(name, device, dtype, lib=LIBRARY)
    op.packet = getattr(torch.ops.fastllm, op.name).default
    return op


def _own(value: Any) -> Any:
    """Contiguous, as the fake kernel says; composite code may keep the input's strides."""
    return value.contiguous() if isinstance(value, Tensor) else tuple(v.contiguous() for v in value)


def _forward(op: Op) -> Any:
    def run(*args: Any) -> Any:
        *resolved, backend = map(_tuple, args)
        op.check(*resolved)
        chosen = op.select(tuple(resolved), backend)
        if op.hidden and chosen.backward is None:  # it makes no hidden results
            chosen = op.backends["reference"]
        out = chosen.forward(*resolved)
        if op.hidden:  # more than the schema has is for eager calls
            out = out[: op.outputs + op.hidden]
        return _own(out)

    return run


def _backward(op: Op) -> Any:
    def run(*args: Any) -> Any:
        *given, needs, backend = map(_tuple, args)
        grads, saved = given[: op.outputs], given[op.outputs :]
        chosen = op.select(op.forward_args(tuple(saved)), backend, training=True)
        results = (chosen.backward or op.reference_backward)(
            *op.first_grad(grads, saved), *saved, needs
        )
        like = saved[op.saved_tensors[0]]
        results = [like.new_empty(0) if r is None else _apart(r, given) for r in results]
        return results[0] if op.results == 1 else tuple(results)

    return run


def _apart(result: Tensor, given: Any) -> Tensor:
    """Contiguous, and no alias of an argument: a dispatcher op may not return one."""
    own = result.contiguous()
    return own.clone() if any(own is g for g in given) else own


def _fake(op: Op) -> Any:
    def run(*args: Any) -> Any:
        return op.fake(*args[:-1])

    return run


def _fake_backward(op: Op) -> Any:
    def run(*args: Any) -> Any:
        *given, needs, _ = args
        saved = given[op.outputs :]
        like = saved[op.saved_tensors[0]]
        shapes = op.fake_backward(*saved)
        results = [
            s if needed and s is not None else like.new_empty(0)
            for s, needed in zip(shapes, needs, strict=True)
        ]
        return results[0] if op.results == 1 else tuple(results)

    return run


def _register_autograd(op: Op, name: str) -> None:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        saved = op.saved(inputs[:-1], output)
        if op.hidden:
            ctx.mark_non_differentiable(*output[op.outputs :])
        ctx.save_for_backward(*[saved[i] for i in op.saved_tensors])
        ctx.rest = [None if i in op.saved_tensors else value for i, value in enumerate(saved)]
        ctx.backend = inputs[-1]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = list(ctx.rest)
        for i, tensor in zip(op.saved_tensors, ctx.saved_tensors, strict=True):
            saved[i] = tensor
        wanted = ctx.needs_input_grad[:-1]
        needs = op.needs(wanted)
        upstream = op.first_grad(grads[: op.outputs], saved)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            results = op.reference_backward(*upstream, *saved, needs)
        else:
            packet = getattr(torch.ops.fastllm, f"{op.name}_backward").default
            made = packet(*upstream, *saved, list(needs), ctx.backend)
            results = (made,) if op.results == 1 else made
        wished = [r if needed else None for r, needed in zip(results, needs, strict=True)]
        return (*op.scatter(wished, len(wanted)), None)

    library: Any = _Choosing(op)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=library)


class _Choosing:
    """A library that puts a choice before the autograd kernel it is given.

    A call that trains fastest on torch becomes torch's own ops, for autograd and for the compiler
    to see; what is traced here cannot be chosen later, when forward has run already.
    """

    def __init__(self, op: Op) -> None:
        self.op = op

    def impl(self, name: str, kernel: Any, key: str, **options: Any) -> None:
        op = self.op

        def choose(keyset: Any, *args: Any) -> Any:
            stock = _stock_training(op, args)
            return kernel(keyset, *args) if stock is None else stock

        LIBRARY.impl(name, choose, key, **options)


def _stock_training(op: Op, args: tuple) -> Any:
    """The results of a call that trains fastest on torch, made by torch; else None."""
    *given, backend = map(_tuple, args)
    resolved = tuple(given)
    tensors = [a for a in resolved if isinstance(a, Tensor)]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if backend is not None or not wanted:
        return None
    run = _trained_by(op, resolved, tensors)
    if run is None or run.backward is not None or run.name == "reference":
        return None
    out = run.forward(*resolved)
    if not op.hidden:
        return out
    results = out if isinstance(out, tuple) else (out,)
    return (*results, *(results[0].new_empty(0) for _ in range(op.hidden)))


def _trained_by(op: Op, args: tuple, tensors: list[Tensor]) -> Backend | None:
    """What a call with gradients runs on; of traced tensors, only what a table says."""
    found = op.routes.find(args, True)
    if found is not None:
        return found[0]
    sizes = [n for t in tensors for n in t.shape] + [a for a in args if isinstance(a, torch.SymInt)]
    device = routes.device_of(op, args)
    if device is None or any(isinstance(n, torch.SymInt) for n in sizes):
        return None
    return op.named(routes.lookup(op, args, device, routes.TRAINING), args)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
