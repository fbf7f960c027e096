"""What is timed: one op on one case in one direction, as candidates for the timing engine."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import functional
from fastllm.core.cases import Case
from fastllm.core.measure import Call, Factory, copies, rotation, size_of
from fastllm.core.op import Op

Run = Callable[[], Any]  # one call, its arguments filled in

DIRECTIONS = ("forward", "backward", "forward+backward")


class Subject:
    """Inputs of one case, rotated, and what a call does with them.

    `direction` forward runs the function alone, backward only the gradients (the graph is made
    beforehand), forward+backward both. Gradients are of every tensor the op has a gradient for,
    from random upstream gradients.
    """

    def __init__(self, op: Op, case: Case, device: str = "cpu", direction: str = "forward") -> None:
        self.op, self.case, self.device, self.direction = op, case, device, direction
        args = case.args(device)
        self.leaves = [i for i in sorted(op.gradients) if isinstance(args[i], Tensor)]
        upstream: tuple[Tensor, ...] = ()
        if direction != "forward":
            wanted = set(self.leaves)
            args = tuple(
                a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)
            )
            outputs = as_tuple(stock(op)(*args))
            upstream = tuple(torch.randn_like(o).detach() for o in outputs)
        self.sets = rotation(size_of((args, upstream)), device)
        self.inputs = copies((args, upstream), self.sets)

    @property
    def args(self) -> tuple:
        """The op's arguments, as the first input set has them."""
        return self.inputs[0][0]

    @property
    def warm(self) -> bool:
        """Whether the inputs stay in the cache: too small to rotate past it."""
        return self.sets == 1

    @property
    def nbytes(self) -> int:
        """The least bytes that have to move."""
        cost = self.op.cost(*self.args)
        forward, backward = cost.forward_bytes, cost.backward_bytes
        return {"forward": forward, "backward": backward}.get(self.direction, forward + backward)

    def candidate(self, function: Callable[..., Any]) -> Factory:
        """`function(*args)` in this subject's direction."""
        return self._candidate(lambda args: functools.partial(function, *args))

    def ours(self) -> Factory:
        """fastllm's public function, as a user calls it."""
        return self._candidate(lambda args: bound(self.op, args))

    def _candidate(self, bind: Callable[[tuple], Run]) -> Factory:
        made = {
            "forward": self._forward,
            "backward": self._backward,
            "forward+backward": self._both,
        }[self.direction]
        return lambda: made([bind(args) for args, _ in self.inputs])

    def compiled(self, function: Callable[..., Any]) -> Factory:
        """The same of `torch.compile(function)`, with all that is no tensor bound as a constant."""

        def factory() -> Call:
            torch._dynamo.reset()
            places = [i for i, a in enumerate(self.args) if isinstance(a, Tensor)]

            def plain(*tensors: Tensor) -> Any:
                full = list(self.args)
                for place, tensor in zip(places, tensors, strict=True):
                    full[place] = tensor
                return function(*full)

            fast = torch.compile(plain, dynamic=False, fullgraph=True)
            return self.candidate(lambda *args: fast(*[args[i] for i in places]))()

        return factory

    def _forward(self, runs: list[Run]) -> Call:
        return lambda i: runs[i]()

    def _both(self, runs: list[Run]) -> Call:
        rest = [([args[k] for k in self.leaves], up) for args, up in self.inputs]

        def call(i: int) -> Any:
            return torch.autograd.grad(as_tuple(runs[i]()), *rest[i])

        return call

    def _backward(self, runs: list[Run]) -> Call:
        graphs = [
            (as_tuple(run()), [args[k] for k in self.leaves], up)
            for run, (args, up) in zip(runs, self.inputs, strict=True)
        ]
        return lambda i: torch.autograd.grad(*graphs[i], retain_graph=True)


def as_tuple(value: Any) -> tuple:
    """An op's result as a tuple of outputs."""
    return value if isinstance(value, tuple) else (value,)


def stock(op: Op) -> Callable[..., Any]:
    """Stock eager PyTorch, called directly: nothing of ours in between."""
    return op.backends["torch"].forward


def bound(op: Op, args: tuple) -> Callable[[], Any]:
    """The call as a user writes it, without arguments: fastllm.functional's own, `args` filled in.

    Keywords go over as keywords; those that have their default value are left out.
    """
    function = getattr(functional, op.name)
    names = [part.split()[-1].split("=")[0] for part in op.schema.params.split(", ")]
    given = dict(zip(names, args, strict=True))
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name in given]
    keyword = inspect.Parameter.KEYWORD_ONLY
    positional = [given[p.name] for p in parameters if p.kind is not keyword]
    keywords = {
        p.name: given[p.name]
        for p in parameters
        if p.kind is keyword and given[p.name] != p.default
    }
    return functools.partial(function, *positional, **keywords)
