"""linear_cross_entropy without the logits: a block of tokens by a part of the classes at a time.

Two ways, with at most chunk_bytes of logits at once in either:

- by parts: forward keeps each token's log-sum-exp; backward computes a part's logits again and at
  once what they bring. The weight's gradient is written once, and no part leaves the caches. One
  product more than the plain loss has.
- whole rows: where float32 gradients of a reduced loss are wanted (or none of the weight), forward
  has all classes of some tokens before it and makes the gradients on the way. No product more.

Cross entropy itself is the kernel of the backend that runs (loss/cpu.py or loss/triton.py); it
replaces logits by their gradient where they lie.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.memory import POOL_FROM
from fastllm.ops.linear_loss import products
from fastllm.ops.linear_loss.products import Sum
from fastllm.ops.linear_loss.spec import LinearOptions, Plan, plan
from fastllm.ops.loss import cpu, triton
from fastllm.ops.loss.spec import Options, mean_divisor


class Head(NamedTuple):
    """logits = input weight^T + low up^T + bias, for any rows and classes."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None

    def logits(self, rows: slice, classes: slice, room: Tensor) -> Tensor:
        """Some of them, in the memory of the flat `room`."""
        x, w = self.input[rows], self.weight[classes]
        out = room[: x.shape[0] * w.shape[0]].view(x.shape[0], w.shape[0])
        products.write(out, x, w, None if self.bias is None else self.bias[classes])
        if self.low is not None and self.up is not None:
            products.add(out, self.low[rows], self.up[classes])
        return out

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and classes of all logits."""
        return self.input.shape[0], self.weight.shape[0]

    def room(self, steps: Plan) -> Tensor:
        """Memory for the logits of one step: from the pool, of which only what is used is there,
        so that backward finds the block that forward left."""
        least = POOL_FROM // self.input.element_size() if self.input.is_cpu else 0
        return products.room(self.input, (max(least, steps.rows * steps.classes),))


def head_of(
    input: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None
) -> Head:
    """The tensors as the loops read them."""
    rest = [None if t is None else t.detach().contiguous() for t in (bias, low, up)]
    return Head(input.detach().contiguous(), weight.detach().contiguous(), *rest)


class Gradients:
    """The gradients of a head that are wanted, filled step by step."""

    def __init__(
        self, head: Head, needs: Sequence[bool], parts: int, blocks: int, complete: bool = True
    ) -> None:
        def sum_of(tensor: Tensor | None, wanted: bool, steps: int) -> Sum | None:
            return Sum(tensor, steps, complete) if wanted and tensor is not None else None

        self.head = head
        self.input = sum_of(head.input, needs[0], parts)
        self.weight = sum_of(head.weight, needs[1], blocks)
        self.low = sum_of(head.low, needs[3], parts)
        self.up = sum_of(head.up, needs[4], blocks)
        self.bias: Tensor | None = None
        if needs[2] and head.bias is not None:
            self.bias = torch.zeros_like(head.bias, dtype=products.wide(head.bias.dtype))

    def add(self, rows: slice, classes: slice, d: Tensor) -> None:
        """What the gradient d of some logits brings."""
        head = self.head
        if self.input is not None:
            self.input.add(rows, d, head.weight[classes].t())
        if self.weight is not None:
            self.weight.add(classes, d.t(), head.input[rows].t())
        if self.bias is not None:
            self.bias[classes] += d.sum(0, dtype=self.bias.dtype)
        if self.low is not None and head.up is not None:
            self.low.add(rows, d, head.up[classes].t())
        if self.up is not None and head.low is not None:
            self.up.add(classes, d.t(), head.low[rows].t())

    def results(self) -> list[Tensor | None]:
        """Of input, weight, bias, low and up; None where not wanted."""
        bias = None if self.bias is None else self.bias.to(self.head.input.dtype)
        sums = [None if s is None else s.result() for s in (self.input, self.weight)]
        more = [None if s is None else s.result() for s in (self.low, self.up)]
        return [*sums, bias, *more]


def steps_of(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


# ---- by parts


class Shard(NamedTuple):
    """Where a head's classes lie among all: those of other processes are before and after."""

    first: int
    classes: int


def forward_by_parts(
    kernels: Any,
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    o: Options,
    steps: Plan,
    shard: Shard,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """(minus the tokens' sums of soft target * logit, their log-sum-exp), float64.

    With `keep` the log-sum-exp is [1 + parts, rows]: of all classes, then of each part.
    """
    rows, count = head.shape
    sums = torch.zeros((rows,), dtype=torch.float64, device=head.input.device)
    lse = torch.full_like(sums, -float("inf"))
    each = []
    room = head.room(steps)
    for part in steps_of(count, steps.classes):
        found = torch.empty_like(lse)
        for block in steps_of(rows, steps.rows):
            logits = head.logits(block, part, room)
            minus, found[block] = kernels.part_forward(
                logits, target[block], class_weight, o, shard.first + part.start, shard.classes
            )
            sums[block] += minus
        lse = torch.logaddexp(lse, found)
        each.append(found)
        if not keep:
            each.clear()
    return sums, torch.stack([lse, *each]) if keep else lse


def token_losses(
    sums: Tensor, lse: Tensor, target: Tensor, class_weight: Tensor | None, o: Options, classes: int
) -> Tensor:
    """The losses of tokens from what the parts gave."""
    kept = target != o.ignore_index
    mass: Tensor | float = 1.0 - o.label_smoothing
    if class_weight is not None:
        mass = mass * class_weight[target.clamp(0, classes - 1)].double()
    if o.label_smoothing:
        total = classes if class_weight is None else class_weight.double().sum()
        mass = mass + o.label_smoothing / classes * total
    losses = sums + mass * lse
    if o.z_loss:
        losses = losses + o.z_loss * lse.square()
    return torch.where(kept, losses, 0)


def backward_by_parts(
    kernels: Any,
    head: Head,
    grad: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    lse: Tensor,
    o: Options,
    steps: Plan,
    shard: Shard,
    needs: Sequence[bool],
    skip_below: float = 0.0,
) -> list[Tensor | None]:
    """The gradients of the head, from those of the tokens' losses (float32)."""
    rows, count = head.shape
    whole = lse[0] if lse.dim() > 1 else lse
    negligible = _negligible(lse, target, o, steps, shard, skip_below)
    parts, blocks = -(-count // steps.classes), -(-rows // steps.rows)
    found = Gradients(head, needs, parts, blocks, complete=negligible is None and rows > 0)
    room = head.room(steps)
    for i, part in enumerate(steps_of(count, steps.classes)):
        for j, block in enumerate(steps_of(rows, steps.rows)):
            if negligible is not None and negligible[i][j]:
                continue
            logits = head.logits(block, part, room)
            kernels.part_backward(
                grad[block], logits, target[block], class_weight, whole[block], o,
                shard.first + part.start, shard.classes,
            )  # fmt: skip
            found.add(block, part, logits)
    return found.results()


def _negligible(
    lse: Tensor, target: Tensor, o: Options, steps: Plan, shard: Shard, skip_below: float
) -> list[list[bool]] | None:
    """By part and block: whether no token has its target, or skip_below of probability, there."""
    if lse.dim() == 1 or not skip_below or o.label_smoothing:
        return None
    kept = target != o.ignore_index
    shares = torch.where(kept, (lse[1:] - lse[0]).exp(), 0)
    own = (target - shard.first) // steps.classes
    inside = kept & (own >= 0) & (own < shares.shape[0])
    tokens = torch.arange(target.numel(), device=target.device)[inside]
    shares[own[inside], tokens] = 1.0
    blocks = [shares[:, b].amax(1) < skip_below for b in steps_of(shares.shape[1], steps.rows)]
    return torch.stack(blocks, 1).tolist()


# ---- whole rows


def both_by_rows(
    kernels: Any,
    head: Head,
    target: Tensor,
    class_weight: Tensor | None,
    o: Options,
    steps: Plan,
    upstream: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(losses, lse, gradients for the upstream gradient of every token)"""
    rows, count = head.shape
    losses = torch.empty((rows,), dtype=torch.float64, device=head.input.device)
    lse = torch.empty_like(losses)
    found = Gradients(head, needs, 1, -(-rows // steps.rows), complete=rows > 0)
    room, all_classes = head.room(steps), slice(0, count)
    for block in steps_of(rows, steps.rows):
        logits = head.logits(block, all_classes, room)
        losses[block], lse[block] = kernels.both_in_place(
            logits, target[block], class_weight, o, upstream
        )
        found.add(block, all_classes, logits)
    return losses, lse, found.results()


# ---- the backends


def functions(kernels: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) with the cross entropy of `kernels`."""

    def forward(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        *options: Any,
    ) -> tuple:
        lo = LinearOptions(*options)
        o = lo.rows
        head = head_of(input, weight, bias, low, up)
        given = (input, weight, bias, low, up)
        needs = [t is not None and t.requires_grad for t in given]
        target, class_weight = target.contiguous(), kernels.prepared(class_weight)
        if target.is_cpu:
            cpu.check_range(target, weight.shape[0], lo.ignore_index)
        divisor = _divisor(target, class_weight, lo)
        keep = lo.save_gradient and lo.reduction != "none" and not lo.skip_below
        gradient = []
        if keep and (input.element_size() > 2 or not needs[1]):
            steps = plan(input, weight, lo.chunk_bytes, whole_rows=True)
            losses, lse, made = both_by_rows(
                kernels, head, target, class_weight, o, steps, 1.0 / divisor, needs
            )
            gradient = [[made]]
        else:
            steps, shard = plan(input, weight, lo.chunk_bytes), Shard(0, weight.shape[0])
            sums, lse = forward_by_parts(
                kernels, head, target, class_weight, o, steps, shard, lo.skip_below > 0
            )
            whole = lse[0] if lse.dim() > 1 else lse
            losses = token_losses(sums, whole, target, class_weight, o, weight.shape[0])
        if lo.reduction != "none":
            losses = losses.sum() / divisor
        return (losses.to(products.wide(input.dtype)), lse, *gradient)

    def backward(
        grad_loss: Tensor,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        lse: Tensor,
        gradient: list | None,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        lo, needs = LinearOptions(*rest[:-1]), rest[-1]
        if gradient:  # the first backward pass takes what forward made; others compute it
            made = gradient.pop()
            if all(t is not None for t, needed in zip(made, needs, strict=True) if needed):
                if not (grad_loss.is_cpu and grad_loss.item() == 1.0):
                    made = [None if t is None else t.mul_(grad_loss) for t in made]
                return tuple(t if n else None for t, n in zip(made, needs, strict=True))
        target, class_weight = target.contiguous(), kernels.prepared(class_weight)
        g = (grad_loss.double() / _divisor(target, class_weight, lo)).float()
        g = g.expand(input.shape[:1]).contiguous()
        found = backward_by_parts(
            kernels, head_of(input, weight, bias, low, up), g, target, class_weight, lse, lo.rows,
            plan(input, weight, lo.chunk_bytes), Shard(0, weight.shape[0]), needs, lo.skip_below,
        )  # fmt: skip
        return tuple(found)

    return forward, backward


def _divisor(target: Tensor, class_weight: Tensor | None, lo: LinearOptions) -> Tensor:
    if lo.reduction == "mean":
        return mean_divisor(target, class_weight, lo.ignore_index).double()
    return torch.ones((), dtype=torch.float64, device=target.device)


def serves(rows: Callable[..., str | None]) -> Callable[..., str | None]:
    """supports() of the linear losses, out of that of a loss of rows."""

    def why_not(input: Tensor, weight: Tensor, target: Any, *rest: Any) -> str | None:
        if not weight.shape[0]:
            return "no classes: computed by torch"
        tensors = [t for t in (weight, *rest) if isinstance(t, Tensor)]
        for tensor in tensors:
            if tensor.device != input.device:
                return f"tensors on {input.device} and on {tensor.device}"
        return rows(input.new_empty((0, 1)), target, None)

    return why_not


BACKENDS: list[Backend] = [
    Backend("cpu", *functions(cpu), serves(cpu.BACKENDS["cross_entropy"].supports)),
    Backend(
        "triton",
        *functions(triton),
        serves(triton.BACKENDS["cross_entropy"].supports),
        triton.available,
    ),
]
