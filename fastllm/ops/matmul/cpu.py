"""The matmul family on the CPU: each product on the library that is forced or chosen.

One table for our kernels, one for oneDNN, and `AUTO`, which chooses for Y, dX and dW separately.
What is not a product (activation gradients, sums over rows) runs on our kernels in all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty, empty_like
from fastllm.ops.matmul import products
from fastllm.ops.matmul.products import ACTIVATION_CODES, CODES

Grads = tuple[Tensor | None, ...]
Choice = Callable[[Tensor, Tensor], str]


class Family:
    """The ops of the family, with `choose(a, b)` naming the library of each product."""

    def __init__(self, choose: Choice) -> None:
        self.choose = choose

    def product(self, a: Tensor, b: Tensor, *rest: Any, **named: Any) -> Tensor:
        """act(a b^T + bias) + residual"""
        return products.PRODUCTS[self.choose(a, b)](a, b, *rest, **named)

    # ---- forward

    def linear(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
    ) -> Tensor:
        """act(x W^T + b) + residual"""
        shape = (*input.shape[:-1], weight.shape[0])
        y = self.product(_rows(input), weight, bias, activation, _rows(residual))
        return y if input.dim() == 2 else y.view(shape)

    def linear_pre(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str | None,
    ) -> tuple[Tensor, Tensor]:
        """(y, z) with z = x W^T + b, y = act(z) + residual"""
        x = _rows(input)
        pre = empty((x.shape[0], weight.shape[0]), x.dtype)
        y = self.product(x, weight, bias, activation, _rows(residual), pre=pre)
        shape = (*input.shape[:-1], weight.shape[0])
        return y.view(shape), pre.view(shape)

    def gated_linear(
        self, input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str
    ) -> Tensor:
        """act(x Wg^T) * (x Wu^T)"""
        return self._pair(input, weight_gate, weight_up, activation, False)[0]

    def gated_linear_pre(
        self, input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str
    ) -> tuple[Tensor, ...]:
        """(y, g, u) with g = x Wg^T, u = x Wu^T, y = act(g) * u"""
        return self._pair(input, weight_gate, weight_up, activation, True)

    def _pair(
        self, input: Tensor, weight_gate: Tensor, weight_up: Tensor, activation: str, keep: bool
    ) -> tuple[Tensor, ...]:
        x = _rows(input)
        shape = (*input.shape[:-1], weight_gate.shape[0])
        if self.choose(x, weight_gate) == "cpu":
            kept = [empty((x.shape[0], shape[-1]), x.dtype) for _ in range(2 if keep else 0)]
            y = products.cpu_pair(x, weight_gate, weight_up, activation, *kept)
        else:
            kept = [self.product(x, weight_gate), self.product(x, weight_up)]
            y = _activated_product(kept[0], kept[1], activation)
        return tuple(t.view(shape) for t in (y, *kept))

    def matmul(self, input: Tensor, other: Tensor) -> Tensor:
        """torch.matmul"""
        a = input.unsqueeze(0) if input.dim() == 1 else input
        b = other.unsqueeze(1) if other.dim() == 1 else other
        y = self._batched(a, b.mT)
        y = y.squeeze(-1) if other.dim() == 1 else y
        return y.squeeze(-1 if other.dim() == 1 else -2) if input.dim() == 1 else y

    def _batched(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T for [*, M, K] and [*, N, K], batches broadcast."""
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        m, n = a.shape[-2], b.shape[-2]
        if b.dim() == 2 and a.dim() != 2:  # one matrix for all: one product
            return self.product(_rows(a), b).view(*batch, m, n)
        if not batch:
            return self.product(a, b)
        left, right = (
            x.expand(*batch, *x.shape[-2:]).reshape(_count(batch), *x.shape[-2:]) for x in (a, b)
        )
        if 0 in batch or self.choose(left[0], right[0]) != "cpu":
            return torch.matmul(a, b.mT)
        return products.cpu(left, right).view(*batch, m, n)

    # ---- backward

    def linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        """dz = dy act'(z), dx = dz W, dW = dz^T x, db = sum(dz), dresidual = dy"""
        pre = None
        if activation is not None and any(needs[:3]):
            pre = self.linear(input, weight, bias, None, None)
        return self._linear_backward(grad_output, None, input, weight, bias, pre, activation, needs)

    def linear_pre_backward(
        self,
        grad_output: Tensor,
        grad_pre: Tensor | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pre: Tensor,
        activation: str | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        """As linear_backward from the kept z, plus the gradient that arrives there."""
        return self._linear_backward(
            grad_output, grad_pre, input, weight, bias, pre, activation, needs
        )

    def _linear_backward(
        self,
        grad_output: Tensor,
        grad_pre: Tensor | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        pre: Tensor | None,
        activation: str | None,
        needs: tuple[bool, ...],
    ) -> Grads:
        residual = grad_output if needs[3] else None
        if not any(needs[:3]):
            return None, None, None, residual
        dz = _rows(grad_output)
        if activation is not None or grad_pre is not None:
            z = None if pre is None else _rows(pre)
            dz, _ = _activation_backward(dz, z, None, activation, _rows(grad_pre), None)
        x = _rows(input)
        dx = self.product(dz, weight.t()).view(input.shape) if needs[0] else None
        dw = self.product(dz.t(), x.t()) if needs[1] else None
        db = row_sum(dz) if needs[2] and bias is not None else None
        return dx, dw, db, residual

    def gated_linear_backward(
        self,
        grad_output: Tensor,
        input: Tensor,
        weight_gate: Tensor,
        weight_up: Tensor,
        activation: str,
        needs: tuple[bool, ...],
    ) -> Grads:
        """The products again, then gated_linear_pre_backward."""
        x = _rows(input)
        gate, up = self.product(x, weight_gate), self.product(x, weight_up)
        return self.gated_linear_pre_backward(
            grad_output, None, None, input, weight_gate, weight_up, gate, up, activation, needs
        )

    def gated_linear_pre_backward(
        self,
        grad_output: Tensor,
        grad_gate: Tensor | None,
        grad_up: Tensor | None,
        input: Tensor,
        weight_gate: Tensor,
        weight_up: Tensor,
        gate: Tensor,
        up: Tensor,
        activation: str,
        needs: tuple[bool, ...],
    ) -> Grads:
        """dg = dy u act'(g), du = dy act(g); dx = dg Wg + du Wu, dWg = dg^T x, dWu = du^T x"""
        dg, du = _activation_backward(
            _rows(grad_output), _rows(gate), _rows(up), activation, _rows(grad_gate), _rows(grad_up)
        )
        x = _rows(input)
        dx = None
        if needs[0]:
            dx = self._sum_of_products(dg, weight_gate.t(), du, weight_up.t()).view(input.shape)
        dwg = self.product(dg.t(), x.t()) if needs[1] else None
        dwu = self.product(du.t(), x.t()) if needs[2] else None
        return dx, dwg, dwu

    def _sum_of_products(self, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        """a b^T + a2 b2^T, summed before the one rounding."""
        if a.dtype == torch.float32:
            first = self.product(a, b)
            if self.choose(a2, b2) == "cpu":
                return products.cpu(a2, b2, out=first, accumulate=True)
            return first.addmm_(a2, b2.t())
        total = torch.empty(a.shape[0], b.shape[0], dtype=torch.float32)
        products.cpu(a, b, out=total)
        return products.cpu(a2, b2, out=total, accumulate=True).to(a.dtype)

    def matmul_backward(
        self, grad_output: Tensor, input: Tensor, other: Tensor, needs: tuple[bool, ...]
    ) -> Grads:
        """dA = dY B^T, dB = A^T dY, summed over what was broadcast; vectors are thin matrices"""
        dy = grad_output
        a, b = input, other
        if other.dim() == 1:
            b, dy = b.unsqueeze(-1), dy.unsqueeze(-1)
        if input.dim() == 1:
            a, dy = a.unsqueeze(0), dy.unsqueeze(-2)
        da = db = None
        if needs[0]:
            da = self._batched(dy, b).sum_to_size(a.shape).reshape(input.shape)
        if needs[1]:
            if b.dim() == 2 and a.dim() > 2:  # one matrix for all: the batch is summed over
                db = self.product(_rows(a).t(), _rows(dy).t()).reshape(other.shape)
            else:
                db = self._batched(a.mT, dy.mT).sum_to_size(b.shape).reshape(other.shape)
        return da, db


def row_sum(x: Tensor) -> Tensor:
    """The sum over the rows of a matrix, in float32, rounded once."""
    x = x.contiguous()
    sums = torch.empty(x.shape[1], dtype=x.dtype)
    _C.gemm_row_sum(
        CODES[x.dtype], x.data_ptr(), sums.data_ptr(), *x.shape, torch.get_num_threads()
    )
    return sums


def _activation_backward(
    grad: Tensor,
    pre: Tensor | None,
    up: Tensor | None,
    activation: str | None,
    more_pre: Tensor | None,
    more_up: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of z, and of up, from that of act(z) or act(z) * up."""
    grad = grad.contiguous()
    pre = grad if pre is None else pre.contiguous()
    up, more_pre, more_up = (None if t is None else t.contiguous() for t in (up, more_pre, more_up))
    dz = empty_like(grad)
    dup = dz if up is None else empty_like(grad)
    _C.gemm_activation_backward(
        CODES[grad.dtype], ACTIVATION_CODES[activation], grad.data_ptr(), pre.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (up, more_pre, more_up)),
        dz.data_ptr(), dup.data_ptr(), grad.numel(), torch.get_num_threads(),
    )  # fmt: skip
    return dz, dup


def _activated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return products.activate(gate, activation).mul_(up)


def _rows(x: Any) -> Any:
    """[*, K] as a matrix; None stays None."""
    if x is None or x.dim() == 2:
        return x
    return x.reshape(x.numel() // x.shape[-1] if x.shape[-1] else _count(x.shape[:-1]), x.shape[-1])


def _count(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


# ---- what is served


def _why_not(*tensors: Any) -> str | None:
    first = tensors[0]
    if not first.is_cpu:
        return f"input on {first.device}: the kernels run on the CPU"
    if first.dtype not in CODES:
        return f"{str(first.dtype).removeprefix('torch.')} input: computed by torch"
    return None


NAMES = ("linear", "linear_pre", "gated_linear", "gated_linear_pre", "matmul")


def _why_not_onednn(*tensors: Any) -> str | None:
    return _why_not(*tensors) or products.onednn_missing(tensors[0].dtype)


def _table(
    name: str, choose: Choice, supports: Callable[..., str | None] = _why_not
) -> dict[str, Backend]:
    family = Family(choose)
    return {
        op: Backend(name, getattr(family, op), getattr(family, f"{op}_backward"), supports)
        for op in NAMES
    }


BACKENDS: dict[str, Backend] = _table("cpu", lambda a, b: "cpu")
ONEDNN: dict[str, Backend] = _table("onednn", lambda a, b: "onednn", _why_not_onednn)
AUTO: dict[str, Backend] = _table("cpu", lambda a, b: products.choose(a, b))
