"""linear_cross_entropy over chunks of tokens: no more logits at once than chunk_bytes allows.

The products are torch's; cross entropy is the kernel of the backend that runs (loss/cpu.py or
loss/triton.py), whose gradient overwrites the chunk's logits. For a reduced loss that will be
differentiated, forward computes the gradients while the logits are there; else backward computes
the logits again. Weight gradients are added up in float32 (float64 for float64).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.loss import cpu, triton

Options = tuple[int, str, float, float, float, float, int, bool]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b: the one place where the forward products are made."""
    return a @ b


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def _chunks(input: Tensor, weight: Tensor, chunk_bytes: int) -> Iterator[slice]:
    rows = max(1, chunk_bytes // max(1, weight.shape[0] * input.element_size()))
    for start in range(0, input.shape[0], rows):
        yield slice(start, min(start + rows, input.shape[0]))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = matmul(x, weight.t())
    return logits if bias is None else logits.add_(bias)


class _Sums:
    """The gradients that are wanted, filled chunk by chunk."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, needs: Any) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.weight = weight
        self.input = torch.empty_like(input) if needs[0] else None
        self.of_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
        self.of_bias: Tensor | None = None
        if needs[2] and bias is not None:
            self.of_bias = torch.zeros_like(bias, dtype=wide)

    def add(self, at: slice, x: Tensor, d: Tensor) -> None:
        """The chunk `at` with inputs x and gradient of the logits d."""
        if self.input is not None:
            torch.mm(d, self.weight, out=self.input[at])
        if self.of_weight is not None:
            accumulate(self.of_weight, d.t(), x)
        if self.of_bias is not None:
            self.of_bias += d.sum(0, dtype=self.of_bias.dtype)

    def results(self) -> list[Tensor | None]:
        """In the dtypes of what they are gradients of."""
        dtype = self.weight.dtype
        wide = (self.of_weight, self.of_bias)
        return [self.input, *(None if t is None else t.to(dtype) for t in wide)]


def _divisor(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor | float:
    if reduction != "mean":
        return 1.0
    kept = target != ignore_index
    if class_weight is None:
        return kept.sum()
    inside = target.clamp(0, class_weight.numel() - 1)
    return torch.where(kept, class_weight[inside].double(), 0).sum()


def functions(kernels: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) with the cross entropy of `kernels`."""

    def forward(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        *options: Any,
    ) -> tuple:
        ignore, reduction, *shape, chunk_bytes, save_gradient = options
        x, w = input.detach().contiguous(), weight.detach()
        rows = (ignore, "none", *shape, True, False)
        if x.is_cpu:
            cpu.check_range(target.contiguous(), w.shape[0], ignore)
        losses = torch.empty(x.shape[:1], dtype=torch.float64, device=x.device)
        lse = torch.empty_like(losses)
        divisor = _divisor(target, class_weight, ignore, reduction)
        keep = save_gradient and reduction != "none"
        sums = _Sums(x, w, bias, (keep, keep, keep))
        upstream = torch.ones((), device=x.device) / divisor
        for at in _chunks(x, w, chunk_bytes):
            logits = _logits(x[at], w, bias)
            losses[at], lse[at] = kernels.cross_entropy(logits, target[at], class_weight, *rows)
            if keep:
                g = upstream.expand(logits.shape[0])
                d = kernels.cross_entropy_backward(
                    g, logits, target[at], class_weight, lse[at], None, *rows, (True,)
                )[0]
                sums.add(at, x[at], d)
                del d
            del logits  # before the next chunk's are made
        if reduction != "none":
            losses = losses.sum() / divisor
        loss = losses.to(input.dtype)
        return (loss, lse, [sums.results()]) if keep else (loss, lse)

    def backward(
        grad_loss: Tensor,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        lse: Tensor,
        gradient: list | None,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        ignore, reduction, *shape, chunk_bytes, _, needs = rest
        if gradient:  # the first backward pass takes what forward made; others compute it
            made = gradient.pop()
            if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
                made = [None if t is None else t.mul_(grad_loss) for t in made]
            return tuple(t if n else None for t, n in zip(made, needs, strict=True))
        x, w = input.detach().contiguous(), weight.detach()
        rows = (ignore, "none", *shape, True, False)
        g = grad_loss.float() / _divisor(target, class_weight, ignore, reduction)
        g = g.float() if reduction == "none" else g.float().expand(x.shape[0])
        sums = _Sums(x, w, bias, needs)
        for at in _chunks(x, w, chunk_bytes):
            logits = _logits(x[at], w, bias)
            d = kernels.cross_entropy_backward(
                g[at], logits, target[at], class_weight, lse[at], None, *rows, (True,)
            )[0]
            sums.add(at, x[at], d)
            del d, logits
        return tuple(sums.results())

    return forward, backward


def _supports(serves: Any) -> Callable[..., str | None]:
    def why_not(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        *options: Any,
    ) -> str | None:
        if not weight.shape[0]:
            return "no classes: computed by torch"
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.device != input.device:
                return f"{name} on {tensor.device} with input on {input.device}"
        return serves(input.new_empty((0, 1)), target, class_weight)

    return why_not


BACKENDS = [
    Backend("cpu", *functions(cpu), _supports(cpu.BACKENDS["cross_entropy"].supports)),
    Backend(
        "triton",
        *functions(triton),
        _supports(triton.BACKENDS["cross_entropy"].supports),
        triton.available,
    ),
]
