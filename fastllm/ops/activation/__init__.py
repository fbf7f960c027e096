"""silu, gelu, relu2, and the gated products swiglu and geglu: fused forward and backward."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import Op, smaller
from fastllm.ops.activation import cpu, reference, spec, stock, triton
from fastllm.ops.activation.cases import cases

# elements, from which the kernels win back what a call from Python costs more than torch's own
SMALL = {"silu": (1 << 14, 1 << 18), "relu2": (1 << 14, 1 << 15), "swiglu": (1 << 13, 1 << 15)}


def _gelu_stock_first(training: bool, input: Tensor, *_: Any) -> bool:
    """oneDNN's gelu, which looks its polynomials up, is faster than ours as long as it need not
    wait for memory: in 16 bits always.
    """
    large = input.dtype == torch.float32 and input.numel() >= 1 << 22
    return input.is_cpu and torch.backends.mkldnn.is_available() and not large


def _register(name: str) -> Op:
    gated = name in spec.GATED
    tensors = (0, 1) if gated else (0,)
    return define(
        name,
        (cpu.BACKENDS[name], triton.BACKENDS[name], stock.BACKENDS[name]),
        reference,
        family="activation",
        schema=spec.schema(name),
        tensors=tensors,
        saved_tensors=tensors,
        gradients={i: i for i in tensors},
        check=spec.check_gated if gated else spec.check_unary,
        fake=spec.fake_gated if gated else spec.fake_unary,
        fake_backward=spec.fake_gated_backward if gated else spec.fake_unary_backward,
        cost=spec.cost_gated if gated else spec.cost_unary,
        cases=cases(name),
        stock_first=_gelu_stock_first if name == "gelu" else smaller(*SMALL.get(name, (0, 0))),
    )


silu_op, gelu_op, relu2_op = map(_register, spec.UNARY)
swiglu_op, geglu_op = map(_register, spec.GATED)


def silu(input: Tensor, *, backend: str | None = None) -> Tensor:
    """x sigmoid(x), as torch.nn.functional.silu (Elfwing et al. 2017), in one rounding.

    input    any shape and float dtype; computed in float32 at least
    backend  forces one of fastllm's backends for this call

    Returns a contiguous tensor of input's shape and dtype. Raises TypeError for what is not a
    floating point tensor, fastllm.UnsupportedError when `backend` cannot serve the call.
    """
    return silu_op(input, backend=backend)


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """x P(X <= x) for a normal X, as torch.nn.functional.gelu (Hendrycks & Gimpel 2016).

    approximate  "none", or "tanh" for 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

    The rest as for `silu`; ValueError for another `approximate`.
    """
    return gelu_op(input, approximate, backend=backend)


def relu2(input: Tensor, *, backend: str | None = None) -> Tensor:
    """max(x, 0)^2, the squared ReLU (So et al. 2021); the rest as for `silu`."""
    return relu2_op(input, backend=backend)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up (Shazeer 2020) in one pass; backward computes silu again from gate.

    gate, up  of one shape, any float dtype; computed in float32 at least, rounded once. Halves of a
              fused projection (`projection.chunk(2, -1)`) are read where they are.
    backend   forces one of fastllm's backends for this call

    Returns a contiguous tensor of their shape, in the dtype of `gate * up`. Raises TypeError or
    ValueError for arguments that do not fit, fastllm.UnsupportedError when `backend` cannot serve
    the call.
    """
    return swiglu_op(gate, up, backend=backend)


def geglu(
    gate: Tensor, up: Tensor, approximate: str = "none", *, backend: str | None = None
) -> Tensor:
    """gelu(gate, approximate) * up (Shazeer 2020) in one pass; the rest as for `swiglu`."""
    return geglu_op(gate, up, approximate, backend=backend)
