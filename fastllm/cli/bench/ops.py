"""Every op as a subject: its cases tagged "bench", in each direction, proven before it is timed."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm import functional
from fastllm.cli.bench import peers
from fastllm.core.cases import Case, Cost
from fastllm.core.measure import Call, Factory, copies, one_line, rotation, size_of
from fastllm.core.op import Op
from fastllm.core.proof import prove, wants_grad
from fastllm.core.subject import Scenario, Subject, Trial

Run = Callable[[], Any]  # one call, its arguments filled in

DIRECTIONS = ("forward", "backward", "forward+backward")
_SAMPLE = 6  # other cases that are proven before an op is timed
INTENSITY = 10  # operations that take about as long as moving a byte does
QUICK = ("forward", "forward+backward")  # backward is about their difference


def public(op: Op) -> bool:
    """Whether a user can call it; the others are parts of those, and timed with them."""
    return op.call is not None or hasattr(functional, op.name)


def subject(op: Op) -> Subject:
    """What the bench times of an op."""
    prover = Prover(op)
    scenarios = [_scenario(op, case, prover) for case in op.cases if "bench" in case.tags]
    if not op.gradients:
        return Subject(op.name, op.family, scenarios, ("forward",))
    return Subject(op.name, op.family, scenarios, DIRECTIONS, QUICK)


def _scenario(op: Op, case: Case, prover: "Prover") -> Scenario:
    def trial(device: str, direction: str) -> Trial:
        return Inputs(op, case, device, direction).trial()

    def wrong(device: str) -> str | None:
        return prover.wrong(case, device)

    least = cost(op, case)
    size = max(least.forward_bytes, least.forward_flops // INTENSITY)
    return Scenario(case.name, case.dtype, size, trial, wrong)


@functools.cache
def cost(op: Op, case: Case) -> Cost:
    """The least that a call must do, from shapes alone where the case allows it."""
    try:
        with FakeTensorMode():
            return op.cost(*case.args())
    except Exception:  # a case that looks at its own values needs real ones
        return op.cost(*case.args())


class Prover:
    """Proves what is about to be timed, once: no speedup is printed for what is wrong.

    That is the timed case, and a sample of the op's others: `fastllm check` goes through them all.
    """

    def __init__(self, op: Op) -> None:
        self.op = op
        self._known: dict[tuple[str, str, str], str | None] = {}

    def wrong(self, case: Case, device: str) -> str | None:
        """The first failure of the op's untimed cases, and of this one, where auto runs it."""
        backend = self.op.select(case.args(device)).name
        others = [c for c in self.op.cases if "bench" not in c.tags]
        sample = others[:: max(1, len(others) // _SAMPLE)]
        found = self._once((backend, device, ""), sample)
        return found or self._once((backend, device, case.name), [case])

    def _once(self, key: tuple[str, str, str], cases: Sequence[Case]) -> str | None:
        if key not in self._known:
            self._known[key] = self._first_failure(key[0], key[1], cases)
        return self._known[key]

    def _first_failure(self, backend: str, device: str, cases: Sequence[Case]) -> str | None:
        for case in cases:
            if self.op.why_not(backend, case.args(device)) is not None:
                continue
            try:
                proof = prove(self.op, case, backend, device)
            except Exception as error:
                return f"{self.op.name} {case.name}: {one_line(error)}"
            if not proof.ok:
                return proof.message
        return None


class Inputs:
    """Inputs of one case, rotated, and what a call does with them.

    `direction` forward runs the function alone, backward only the gradients (the graph is made
    beforehand), forward+backward both. Gradients are of every tensor the op has a gradient for,
    from random upstream gradients.
    """

    def __init__(self, op: Op, case: Case, device: str = "cpu", direction: str = "forward") -> None:
        self.op, self.case, self.device, self.direction = op, case, device, direction
        args = case.args(device)
        self.leaves = [i for i in sorted(op.gradients) if wants_grad(op, i, args[i])]
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
    def work(self) -> tuple[int, int]:
        """The least bytes that have to move, and the least floating point operations."""
        x = self.op.cost(*self.args)
        forward, backward = (x.forward_bytes, x.forward_flops), (x.backward_bytes, x.backward_flops)
        if self.direction == "forward+backward":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if self.direction == "forward" else backward

    def trial(self) -> Trial:
        """All candidates on these inputs."""
        nbytes, flops = self.work
        # a compiled graph's backward cannot be run twice: its buffers are donated
        compiled = {} if self.direction == "backward" else {"compiled": self.compiled()}
        loaders = peers.installed(self.op.name, self.device)
        return Trial(
            ours=self.ours(),
            stock={"eager": self.candidate(stock(self.op))},
            nbytes=nbytes,
            flops=flops,
            compiled=compiled,
            peers={name: self._loaded(load) for name, load in loaders.items()},
            sets=self.sets,
            backend=self.op.select(self.args).name,
        )

    def candidate(self, function: Callable[..., Any]) -> Factory:
        """`function(*args)` in this direction."""
        return self._candidate(lambda args: functools.partial(function, *args))

    def ours(self) -> Factory:
        """fastllm's public function, as a user calls it."""
        return self._candidate(lambda args: bound(self.op, args))

    def _loaded(self, load: Callable[[], Callable[..., Any]]) -> Factory:
        return lambda: self.candidate(load())()

    def _candidate(self, bind: Callable[[tuple], Run]) -> Factory:
        made = {
            "forward": self._forward,
            "backward": self._backward,
            "forward+backward": self._both,
        }[self.direction]
        return lambda: made([bind(args) for args, _ in self.inputs])

    def compiled(self) -> Factory:
        """Stock under torch.compile, with all that is no tensor bound as a constant."""
        function = stock(self.op)

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
    if op.call is not None:
        return op.call(*args)
    function = getattr(functional, op.name)
    names = [part.split()[-1].split("=")[0] for part in op.schema.params.split(", ")]
    given = dict(zip(names, args, strict=True))
    parameters = list(inspect.signature(function).parameters.values())
    positional = []
    while parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY:
        if parameters[0].name not in given:
            break
        positional.append(given[parameters.pop(0).name])
    keywords = {}
    for p in parameters:
        value = given.get(p.name, p.default)
        if isinstance(value, Tensor) or value != p.default:
            keywords[p.name] = value
    return functools.partial(function, *positional, **keywords)
