"""An op: one definition, several backends, one way to call it.

A plain eager call takes a short path, in C once it has been seen (csrc/head.cpp): pick a backend,
run it, wrap it in an autograd.Function when a gradient is needed. torch.compile, tensor subclasses,
dispatch modes and autocast go through the dispatcher op `torch.ops.fastllm.<name>` (dispatch.py);
functorch transforms and forward-mode AD get plain torch code that they can transform.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastllm._C import Head
from fastllm.core.backend import BACKENDS, Backend, check_name, choice
from fastllm.core.cases import Case, Cost
from fastllm.core.errors import UnsupportedError
from fastllm.core.fast import GUARDS
from fastllm.core.tuner.routes import Routes

OPS: dict[str, "Op"] = {}

_PLAIN = frozenset((Tensor, Parameter))
_TRACED = (FakeTensor, FunctionalTensor)
_modes, _function_modes, _transforms, _autocast, _tracing = GUARDS
_dynamo = torch.compiler.is_dynamo_compiling
_grad_enabled = torch.is_grad_enabled
_unsafe_view = torch.ops.aten._unsafe_view.default


@dataclass(frozen=True)
class Schema:
    """The dispatcher's view of an op, in the dispatcher's own notation, without the parentheses."""

    params: str
    returns: str
    backward_params: str
    backward_returns: str


@dataclass(eq=False)
class Op:
    """A differentiable op. All callables take the op's resolved arguments in order.

    tensors            positions of the tensor arguments
    saved              saved(args, outputs): what backward takes after the gradients
    saved_tensors      positions of tensors in it
    gradients          argument position -> position in backward's result
    check              raises ValueError or TypeError that names the argument
    check_values       whether check reads values, too: else it need not be asked about every call
    fake               shapes and dtypes of the outputs, without computing
    fake_backward      the same for the gradients: fake_backward(*saved)
    reference          plain torch, any dtype; in float64 it is the oracle
    reference_backward plain torch, itself differentiable: reference_backward(*grads, *saved, needs)
    forward_args       the forward arguments that select() sees in backward: forward_args(saved)
    autocast           dtype that autocast casts floating inputs to, by device type
    autocast_composite device types on which autocast gets plain torch code instead
    mutates            positions of tensors that forward writes in place
    key                key(*args): a call's word in the tuner's table; None: made of all arguments
    stock_first        stock_first(training, *args): whether stock torch's own call is likely the
                       fastest; for eager calls that no table knows
    hidden             results after the `outputs` that only backward reads (a log-sum-exp, say);
                       callers never see them, composite backends do not make them
    call               call(*args): the public function's call, without arguments; None: that of
                       functional's function of this name, by the schema's names
    values             values(args, outputs): what is proven in place of outputs that are codes of
                       numbers, not numbers
    """

    name: str
    family: str
    schema: Schema
    tensors: tuple[int, ...]
    saved: Callable[[tuple, Any], tuple]
    saved_tensors: tuple[int, ...]
    gradients: dict[int, int]
    check: Callable[..., None]
    fake: Callable[..., Any]
    fake_backward: Callable[..., tuple]
    reference: Callable[..., Any]
    reference_backward: Callable[..., tuple]
    implementations: Sequence[Backend]
    cost: Callable[..., Cost]
    forward_args: Callable[[tuple], tuple] = tuple
    cases: tuple[Case, ...] = ()
    autocast: dict[str, torch.dtype] = field(default_factory=dict)
    autocast_composite: tuple[str, ...] = ()
    mutates: tuple[int, ...] = ()
    outputs: int = 1
    key: Callable[..., str] | None = None
    hidden: int = 0
    stock_first: Callable[..., bool] | None = None
    check_values: bool = False
    call: Callable[..., Callable[[], Any]] | None = None
    values: Callable[[tuple, tuple], tuple[Tensor, ...]] | None = None

    def __post_init__(self) -> None:
        found = {b.name: b for b in self.implementations}
        self.backends = {name: found[name] for name in BACKENDS if name in found}
        self.results = max(self.gradients.values()) + 1 if self.gradients else 0
        self._runnable: list[Backend] | None = None
        self.with_grad = _differentiable(self)
        self.packet: Any = None
        self.routes: Head = Routes(self)
        if self.name in OPS:
            raise ValueError(f"name: an op {self.name!r} is registered already")
        OPS[self.name] = self

    # ---- calling

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        """Runs the op on resolved arguments; `backend` forces one."""
        if _dynamo():
            return self.dispatch(args, backend)
        if backend is None:
            out = self.routes(*args)
            if out is not NotImplemented:
                return out
        return self.general(args, backend)

    def general(self, args: tuple, backend: str | None) -> Any:
        """Any call, step by step: what is not ordinary, wrong, or forced."""
        if torch.compiler.is_compiling():
            return self.dispatch(args, backend)
        grad = False
        for i in self.tensors:
            tensor = args[i]
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN:
                self.require_tensor(i, tensor)
                # a foreign subclass (DTensor, a quantized weight) knows torch's ops, not ours
                known = isinstance(tensor, _TRACED)
                return self.dispatch(args, backend) if known else self.composite(args, backend)
            if tensor.is_neg():  # a lazy negation: the bytes are not the values
                return self.dispatch(args, backend)
            grad = grad or tensor.requires_grad
        if _modes() or _function_modes() or _tracing() or _autocast():
            return self.dispatch(args, backend)
        if _transforms() or forward_ad._current_level >= 0:
            return self.composite(args, backend)
        self.check(*args)
        training = grad and _grad_enabled()
        return self.run(self.forced(args, backend) or self.default(args, training), training, args)

    def run(self, run: Backend, training: bool, args: tuple) -> Any:
        """An ordinary call with arguments that were found right."""
        if run.backward is None:
            return run.forward(*args)
        if training:
            return self.with_grad(run, *args)
        out = None if run.fast is None else run.fast(*args)
        if out is None:
            out = run.forward(*args)
        if self.mutates:
            self.bump(args)
        return self.visible(out) if self.hidden else out

    def prepared(self, run: Backend, training: bool) -> tuple[Callable[..., Any], Any, Any]:
        """run() for calls like one that was found right: (call, its first argument, otherwise).

        None stands for no such argument, and for no other call to make where `call` answers None.
        """

        def general(*args: Any) -> Any:
            if self.check_values:
                self.check(*args)
            return self.run(run, training, args)

        if self.check_values:
            return general, None, None
        if run.backward is None:
            return run.forward, None, None
        if training:
            return self.with_grad, run, None
        if self.mutates or self.hidden:
            return general, None, None
        return (run.forward, None, None) if run.fast is None else (run.fast, None, run.forward)

    def dispatch(self, args: tuple, backend: str | None) -> Any:
        """The call through torch's dispatcher: compile, subclasses, modes and autocast see it."""
        if self.packet is None:
            raise RuntimeError(f"fastllm.{self.name} is not registered with the dispatcher")
        name = choice.name if backend is None else check_name(backend)
        if name is not None and name in self.backends and self.backends[name].backward is None:
            return self.composite(args, name)
        for device in self.autocast_composite:
            if torch.is_autocast_enabled(device) and args[0].device.type == device:
                return self.composite(args, name)
        out = self.packet(*args, name)
        return self.visible(out) if self.hidden else out

    def composite(self, args: tuple, backend: str | None) -> Any:
        """The call as plain torch code, which functorch and forward-mode AD can transform."""
        self.check(*args)
        name = choice.name if backend is None else check_name(backend)
        for run in self.backends.values():
            allowed = run.name in ("torch", "reference") and name in (None, run.name)
            if allowed and run.supports(*args) is None:
                out = run.forward(*args)
                return self.visible(out) if self.hidden and run.backward is not None else out
        raise UnsupportedError(
            f"fastllm.{self.name}: backend {name or 'auto'!r} cannot run under a functorch "
            "transform, forward-mode AD or a tensor subclass; torch and reference can"
        )

    def visible(self, results: tuple) -> Any:
        """What the caller gets of all results."""
        return results[0] if self.outputs == 1 else results[: self.outputs]

    def require_tensor(self, position: int, value: Any) -> None:
        """TypeError that names the argument, unless it is a tensor or a subclass of it."""
        if not isinstance(value, Tensor):
            name = self.schema.params.split(", ")[position].split()[-1]
            raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")

    def bump(self, args: tuple) -> None:
        """Tells autograd which tensors were written in place."""
        torch.autograd.graph.increment_version([args[i] for i in self.mutates])

    # ---- choosing

    def select(self, args: tuple, backend: str | None = None, training: bool = False) -> Backend:
        """The backend of a call: asked for, or measured to win, or the first that serves.

        A backward pass that is an op of its own (`training`) may follow a forward by any other; a
        composite could only have come with its own.
        """
        run = self.forced(args, backend)
        if run is None:
            found = self.routes.find(args, training)
            run = None if found is None else found[0]
            if run is not None and run.backward is None and (training or self.hidden):
                run = None
        return run or self.first(args)

    def forced(self, args: tuple, backend: str | None) -> Backend | None:
        """The backend that the call, the context or the environment asks for."""
        name = choice.name if backend is None else check_name(backend)
        if name is None:
            return None
        run = self.backends.get(name)
        if run is not None and run.missing is None and run.supports(*args) is None:
            return run
        raise self.unsupported(args, name)

    def named(self, name: str | None, args: tuple) -> Backend | None:
        """The backend of this name, if there is one and it can serve `args`."""
        run = self.backends.get(name) if name else None
        served = run is not None and run.missing is None and run.supports(*args) is None
        return run if served else None

    def default(self, args: tuple, training: bool) -> Backend:
        """The backend of an eager call that nobody has measured."""
        if self.stock_first is not None and self.stock_first(training, *args):
            run = self.named("torch", args)
            if run is not None:
                return run
        return self.first(args)

    def first(self, args: tuple) -> Backend:
        """The first backend, in order of preference, that can serve `args`."""
        runnable = self._runnable
        if runnable is None:
            runnable = self._runnable = [b for b in self.backends.values() if b.missing is None]
        for run in runnable:
            if run.supports(*args) is None:
                return run
        raise self.unsupported(args, None)

    def why_not(self, name: str, args: tuple) -> str | None:
        """Why backend `name` cannot serve `args`, or None when it can."""
        run = self.backends.get(name)
        if run is None:
            return f"{self.name} has no such backend"
        return run.missing or run.supports(*args)

    def unsupported(self, args: tuple, name: str | None) -> UnsupportedError:
        """The error that tells every backend's reason."""
        what = f"backend {name!r} cannot" if name else "no backend can"
        seen = ", ".join(describe(args[i]) for i in self.tensors if args[i] is not None)
        rows = [f"  {n}: {self.why_not(n, args) or 'can serve it'}" for n in self.backends]
        if name is not None and name not in self.backends:
            rows.append(f"  {name}: {self.name} has no such backend")
        return UnsupportedError("\n".join([f"fastllm.{self.name}: {what} serve ({seen})", *rows]))

    # ---- gradients

    def scatter(self, results: Sequence[Tensor | None], count: int) -> list[Tensor | None]:
        """Backward's results as gradients of the `count` forward arguments."""
        grads: list[Tensor | None] = [None] * count
        for argument, result in self.gradients.items():
            grads[argument] = results[result]
        return grads

    def needs(self, wanted: Sequence[bool]) -> tuple[bool, ...]:
        """Which of backward's results are wanted, from which arguments' gradients are."""
        out = [False] * self.results
        for argument, result in self.gradients.items():
            out[result] = out[result] or wanted[argument]
        return tuple(out)

    def first_grad(
        self, grads: Sequence[Tensor | None], saved: Sequence[Any]
    ) -> list[Tensor | None]:
        """The upstream gradients with the first one made real: later ones may be None."""
        first = grads[0]
        if first is None:
            first = torch.zeros_like(saved[self.saved_tensors[0]])
        return [first, *grads[1:]]


def smaller(forward: int, training: int) -> Callable[..., bool]:
    """An op's `stock_first`: its first argument is on the CPU and has fewer elements than this."""

    def stock_first(wanted: bool, input: Tensor, *_: Any) -> bool:
        return input.is_cpu and input.numel() < (training if wanted else forward)

    return stock_first


def _differentiable(op: Op) -> Callable[..., Any]:
    """apply(backend, *args) of an autograd.Function for `op`.

    `ctx`-style, since setup_context costs several microseconds more; and the C method itself, since
    Function.apply's functorch checks were made before.
    """
    tensors = op.saved_tensors
    count = len(op.schema.backward_params.split(", ")) - op.outputs
    others = tuple(i for i in range(count) if i not in tensors)
    pick_tensors, pick_others = _picker(tensors), _picker(others)
    several, mutates, saved_of = op.outputs > 1, op.mutates, op.saved
    hidden, visible = op.hidden, op.visible

    class Call(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Backend, *args: Any) -> Any:
            out = None if run.fast is None else run.fast(*args)
            if out is None:
                out = run.forward(*args)
                if not mutates:
                    out = _base(out) if isinstance(out, Tensor) else tuple(map(_base, out))
            saved = saved_of(args, out)
            ctx.save_for_backward(*pick_tensors(saved))
            ctx.call = run, pick_others(saved)
            if several:
                ctx.set_materialize_grads(False)
            if mutates:
                ctx.mark_dirty(*[args[i] for i in mutates])
            return visible(out) if hidden else out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            run, rest = ctx.call
            by_place = dict(zip((*tensors, *others), (*ctx.saved_tensors, *rest), strict=True))
            saved = [by_place[i] for i in range(count)]
            wanted = ctx.needs_input_grad[1:]
            # create_graph: plain torch code, so that the gradient can be differentiated again
            backward = op.reference_backward if _grad_enabled() else run.backward
            grads = tuple(g if g is None else g.resolve_neg() for g in grads)
            results = backward(*op.first_grad(grads, saved), *saved, op.needs(wanted))
            return (None, *op.scatter(results, len(wanted)))

    Call.__name__ = Call.__qualname__ = f"fastllm_{op.name}"
    return super(torch.autograd.Function, Call).apply


def _base(result: Any) -> Any:
    """A new result as no view: autograd would not let its owner write to one in place."""
    view = isinstance(result, Tensor) and result._is_view()
    return _unsafe_view(result, result.shape) if view else result


def _picker(places: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """An itemgetter that returns a tuple for any number of places."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda values: tuple(values[i] for i in places)


def _ordinary() -> bool:
    """Whether nothing watches or transforms this call."""
    special = _modes() or _function_modes() or _tracing() or _autocast() or _transforms()
    return not special and forward_ad._current_level < 0


def describe(value: Any) -> str:
    """A tensor in an error message: dtype, shape, device."""
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
