"""linear_distillation over chunks of tokens: chunk_bytes of either's logits are all there is.

Where a gradient will follow and every token's upstream gradient is known, forward makes it while
the logits are there; else backward computes them again. The teacher's logits are overwritten by the
divergence's gradient, the student's by that of cross entropy.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.linear_distill.reference import counted
from fastllm.ops.linear_distill.spec import Options
from fastllm.ops.linear_loss import products
from fastllm.ops.linear_loss.chunked import Gradients, head_of, serves, steps_of, token_losses
from fastllm.ops.linear_loss.spec import plan
from fastllm.ops.loss import cpu, triton
from fastllm.ops.loss.spec import Options as RowOptions


class Chunks:
    """Both heads and what is asked of them."""

    def __init__(self, kernels: Any, tensors: Sequence[Any], o: Options) -> None:
        s_hidden, s_weight, t_hidden, t_weight, target, s_bias, t_bias = tensors
        self.kernels, self.o = kernels, o
        self.student = head_of(s_hidden, s_weight, s_bias, None, None)
        self.teacher = head_of(t_hidden, t_weight, t_bias, None, None)
        self.target = None if target is None else target.contiguous()
        self.alpha = 1.0 if target is None else o.alpha
        self.row = RowOptions(o.ignore_index, "none", 0.0, 0.0, 0.0, 1.0)
        # two logits of every class: each has half of the room
        self.steps = plan(s_hidden, s_weight, max(1, o.chunk_bytes // 2), whole_rows=True)

    def run(self, grad: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, list]:
        """(losses of the tokens, gradients); `grad`, of the losses in float32, or None: none."""
        rows, classes = self.student.shape
        losses = torch.empty((rows,), dtype=torch.float64, device=self.student.input.device)
        blocks = -(-rows // self.steps.rows)
        made = None
        if grad is not None:
            made = Gradients(self.student, (*needs, False, False), 1, blocks, complete=rows > 0)
        rooms = [head.room(self.steps) for head in (self.student, self.teacher)]
        everything = slice(0, classes)
        for block in steps_of(rows, self.steps.rows):
            s, t = (
                head.logits(block, everything, room)
                for head, room in zip((self.student, self.teacher), rooms, strict=True)
            )
            losses[block] = self._block(block, s, t, None if grad is None else grad[block])
            if made is not None:
                made.add(block, everything, s if self._has_hard else t)
        return losses, [] if made is None else made.results()[:3]

    @property
    def _has_hard(self) -> bool:
        return self.target is not None and self.alpha != 1.0

    def _block(self, at: slice, s: Tensor, t: Tensor, grad: Tensor | None) -> Tensor:
        """The tokens' losses; the gradient is left in s, or in t without cross entropy."""
        kind, temperature = self.o.divergence, self.o.temperature
        share = self.alpha * temperature**2
        soft, stats = self.kernels.divergence(s, t, kind, temperature)
        losses = soft.double() * share
        kept = None if self.target is None else self.target[at] != self.o.ignore_index
        if kept is not None:
            losses = torch.where(kept, losses, 0)
        if grad is not None:
            self.kernels.divergence_backward(
                grad * share, s, t, stats, kind, temperature, (True,), out=t
            )
            if kept is not None and not kept.all():
                t.masked_fill_(~kept.unsqueeze(-1), 0)
        if self._has_hard:
            losses += self._hard(at, s, t, grad)
        return losses

    def _hard(self, at: slice, s: Tensor, t: Tensor, grad: Tensor | None) -> Tensor:
        """(1 - alpha) cross entropy; its gradient and t, which has the divergence's, go to s."""
        target, weight, classes = self.target, 1.0 - self.alpha, s.shape[1]
        assert target is not None
        sums, lse = self.kernels.part_forward(s, target[at], None, self.row, 0, classes)
        losses = token_losses(sums, lse, target[at], None, self.row, classes)
        if grad is not None:
            g = grad * weight
            self.kernels.part_backward(g, s, target[at], None, lse, self.row, 0, classes)
            s.add_(t)
        return losses * weight


def functions(kernels: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) with the losses of `kernels`."""

    def forward(*args: Any) -> tuple:
        tensors, o = args[:7], Options(*args[7:])
        hidden, weight, _, _, target, bias, _ = tensors
        if target is not None and target.is_cpu:
            cpu.check_range(target.contiguous(), weight.shape[0], o.ignore_index)
        needs = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        count = counted(target, hidden.shape[0], o.ignore_index, hidden)
        keep = o.save_gradient and o.reduction != "none"
        grad = None
        if keep:
            scale = 1.0 / count if o.reduction == "mean" else torch.ones_like(count)
            grad = scale.float().expand(hidden.shape[0]).contiguous()
        losses, made = Chunks(kernels, tensors, o).run(grad, needs)
        if o.reduction != "none":
            losses = losses.sum()
        if o.reduction == "mean":
            losses = losses / count
        loss = losses.to(products.wide(hidden.dtype))
        return (loss, count, [made]) if keep else (loss, count)

    def backward(grad_loss: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        tensors, (count, gradient), rest = saved[:7], saved[7:9], saved[9:]
        o, needs = Options(*rest[:-1]), rest[-1]
        if gradient:  # the first backward pass takes what forward made; others compute it
            made = gradient.pop()
            if all(t is not None for t, needed in zip(made, needs, strict=True) if needed):
                if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
                    made = [None if t is None else t.mul_(grad_loss) for t in made]
                return tuple(t if n else None for t, n in zip(made, needs, strict=True))
        g = grad_loss.double() / count if o.reduction == "mean" else grad_loss
        g = g.float().expand(tensors[0].shape[:1]).contiguous()
        return tuple(Chunks(kernels, tensors, o).run(g, needs)[1])

    return forward, backward


def _supports(rows: Callable[..., str | None]) -> Callable[..., str | None]:
    heads = serves(rows)

    def why_not(hidden: Tensor, weight: Tensor, *rest: Any) -> str | None:
        teacher = rest[0]
        if teacher.dtype != hidden.dtype:
            return f"{teacher.dtype} teacher with {hidden.dtype} student: computed by torch"
        return heads(hidden, weight, None, *rest)

    return why_not


def _pair(module: Any) -> Callable[..., str | None]:
    alike = module.BACKENDS["divergence"].supports
    return lambda input, target, weight: alike(input, input)


BACKENDS: list[Backend] = [
    Backend("cpu", *functions(cpu), _supports(_pair(cpu))),
    Backend("triton", *functions(triton), _supports(_pair(triton)), triton.available),
]
