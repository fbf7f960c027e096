"""linear with fused epilogues, the gated pair, matmul: forward and backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.core.op import Op
from fastllm.ops.matmul import cpu, packed, reference, spec, stock, triton
from fastllm.ops.matmul.cases import cases
from fastllm.ops.matmul.packed import prepack as prepack
from fastllm.ops.matmul.packed import unpack as unpack
from fastllm.ops.matmul.worth import STOCK_FIRST

TABLES = (cpu.BACKENDS, cpu.ONEDNN, triton.BACKENDS, stock.BACKENDS)


class ProductOp(Op):
    """An op made of products: unforced on a CPU, each of them runs on the library chosen for it."""

    def run(self, run: Backend, training: bool, args: tuple) -> Any:
        """A weight that was packed for our kernel is for it, whatever its size is worth."""
        if packed.PACKS and run.name == "torch" and packed.pointer(args[1]):
            run = self.named("cpu", args) or run
        return super().run(run, training, args)

    def prepared(self, run: Backend, training: bool) -> tuple[Callable[..., Any], Any, Any]:
        """Where there are packs, each call asks whether its weight has one."""
        if packed.PACKS and run.name == "torch":
            return (lambda *args: self.run(run, training, args)), None, None
        return super().prepared(run, training)

    def named(self, name: str | None, args: tuple) -> Backend | None:
        """Measured to win, "cpu" means the choice by product."""
        run = super().named(name, args)
        return cpu.AUTO[self.name] if run is not None and name == "cpu" else run

    def first(self, args: tuple) -> Backend:
        """The choice by product where it can serve, else the first that can."""
        return self.named("cpu", args) or super().first(args)


def _register(name: str, **facts: Any) -> Op:
    """The op `name`: what its name settles, and the facts that are its own."""
    backends = [table[name] for table in TABLES if name in table]
    facts.update(family="matmul", schema=spec.SCHEMAS[name], cases=cases(name))
    facts["autocast_composite"] = ("cpu", "cuda")
    facts["stock_first"] = STOCK_FIRST[name]
    return define(name, backends, reference, kind=ProductOp, **facts)


def _linear_saved(args: tuple, outputs: Any) -> tuple:
    input, weight, bias, _, activation = args
    return input, weight, bias, activation


def _linear_pre_saved(args: tuple, outputs: tuple) -> tuple:
    input, weight, bias, _, activation = args
    return input, weight, bias, outputs[1], activation


def _linear_again(saved: tuple) -> tuple:
    """Forward arguments again: a residual does not change what serves."""
    return (*saved[:3], None, saved[-1])


def _gated_pre_saved(args: tuple, outputs: tuple) -> tuple:
    return (*args[:3], *outputs[1:], args[3])


def _gated_again(saved: tuple) -> tuple:
    return (*saved[:3], saved[-1])


linear_op = _register(
    "linear",
    tensors=(0, 1, 2, 3),
    saved=_linear_saved,
    saved_tensors=(0, 1, 2),
    gradients={0: 0, 1: 1, 2: 2, 3: 3},
    forward_args=_linear_again,
    check=spec.check_linear,
    fake=spec.fake_linear,
    fake_backward=spec.fake_linear_backward,
    cost=spec.cost_linear,
)
linear_pre_op = _register(
    "linear_pre",
    tensors=(0, 1, 2, 3),
    saved=_linear_pre_saved,
    saved_tensors=(3, 0, 1, 2),  # first what has the output's shape
    gradients={0: 0, 1: 1, 2: 2, 3: 3},
    outputs=2,
    forward_args=_linear_again,
    check=spec.check_linear,
    fake=spec.fake_linear_pre,
    fake_backward=spec.fake_linear_backward,
    cost=spec.cost_linear,
)
gated_linear_op = _register(
    "gated_linear",
    tensors=(0, 1, 2),
    saved_tensors=(0, 1, 2),
    gradients={0: 0, 1: 1, 2: 2},
    check=spec.check_gated,
    fake=spec.fake_linear,
    fake_backward=spec.fake_gated_backward,
    cost=spec.cost_gated,
)
gated_linear_pre_op = _register(
    "gated_linear_pre",
    tensors=(0, 1, 2),
    saved=_gated_pre_saved,
    saved_tensors=(3, 4, 0, 1, 2),
    gradients={0: 0, 1: 1, 2: 2},
    outputs=3,
    forward_args=_gated_again,
    check=spec.check_gated,
    fake=spec.fake_gated_pre,
    fake_backward=spec.fake_gated_backward,
    cost=spec.cost_gated,
)
matmul_op = _register(
    "matmul",
    tensors=(0, 1),
    saved_tensors=(0, 1),
    gradients={0: 0, 1: 1},
    check=spec.check_matmul,
    fake=spec.fake_matmul,
    fake_backward=spec.fake_matmul_backward,
    cost=spec.cost_matmul,
)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """act(input weight^T + bias) + residual in one pass, as torch.nn.functional.linear.

    input       [*, K], any float dtype; computed in float32 (float64 in float64), rounded once
    weight      [N, K], of input's dtype
    bias        [N] or None
    activation  None, "gelu", "gelu_tanh", "silu", "relu" or "relu2" (its square)
    residual    [*, N] or None, added last
    backend     forces one of fastllm's backends for this call, forward and backward

    Returns [*, N]. Raises ValueError or TypeError for arguments that do not fit,
    fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    kind = casting(input)
    if kind is not None:
        with torch.autocast(kind, enabled=False):
            return linear(
                *cast(kind, input, weight, bias),
                activation=activation,
                residual=cast(kind, residual)[0],
                backend=backend,
            )
    op = linear_op
    if activation is not None and _differentiated(input, weight, bias):
        op = linear_pre_op
    out = op(input, weight, bias, residual, activation, backend=backend)
    return out if op is linear_op else out[0]


def gated_linear(
    input: Tensor,
    weight_gate: Tensor,
    weight_up: Tensor,
    *,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """act(input weight_gate^T) * (input weight_up^T): SwiGLU with "silu" (Shazeer 2020).

    input [*, K], both weights [N, K]; activations, result [*, N] and errors as for `linear`.
    """
    kind = casting(input)
    if kind is not None:
        with torch.autocast(kind, enabled=False):
            args = cast(kind, input, weight_gate, weight_up)
            return gated_linear(*args, activation=activation, backend=backend)
    if _differentiated(input, weight_gate, weight_up):
        return gated_linear_pre_op(input, weight_gate, weight_up, activation, backend=backend)[0]
    return gated_linear_op(input, weight_gate, weight_up, activation, backend=backend)


def matmul(input: Tensor, other: Tensor, *, backend: str | None = None) -> Tensor:
    """The matrix product with torch.matmul's semantics: vectors, matrices, broadcast batches.

    Both of one floating dtype; summed in float32, rounded once. Errors as for `linear`.
    """
    kind = casting(input)
    if kind is not None:
        with torch.autocast(kind, enabled=False):
            return matmul(*cast(kind, input, other), backend=backend)
    return matmul_op(input, other, backend=backend)


def _differentiated(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(
        t is not None and isinstance(t, Tensor) and t.requires_grad for t in tensors
    )
