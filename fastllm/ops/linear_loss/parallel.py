"""linear_cross_entropy over a vocabulary that several processes share.

Each has the logits of its own classes only; what is exchanged are two numbers a token forward, and
the gradient of the input backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.core.backend import choice
from fastllm.core.errors import UnsupportedError
from fastllm.ops.linear_loss import chunked, spec
from fastllm.ops.linear_loss.chunked import Shard
from fastllm.ops.loss import cpu, triton
from fastllm.ops.loss.spec import mean_divisor


def linear_cross_entropy(group: Any, backend: str | None, *args: Any) -> Tensor:
    """The op's arguments, but for weight, bias and up, of which each process has its shard."""
    input, weight, target, bias, class_weight, low, up, *options = args
    shard = _shard(weight, group)
    spec.check(input, weight, target, bias, None, low, up, *options)
    if class_weight is not None and class_weight.shape != (shard.classes,):
        raise ValueError(
            f"class_weight: expected shape [{shard.classes}], one value a class of all processes, "
            f"found {list(class_weight.shape)}"
        )
    o = spec.LinearOptions(*options)
    if input.is_cpu:
        cpu.check_range(target.contiguous(), shard.classes, o.ignore_index)
    kernels = _kernels(backend, args)
    loss = _Sharded.apply(group, kernels, shard, o, target, class_weight, *args[:2], bias, low, up)
    if o.reduction == "none":
        return loss
    total = loss.sum()
    if o.reduction == "sum":
        return total
    return total / mean_divisor(target, class_weight, o.ignore_index)


def _shard(weight: Tensor, group: Any) -> Shard:
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=weight.device)
    rank = dist.get_rank(group)
    counts[rank] = weight.shape[0]
    dist.all_reduce(counts, group=group)
    return Shard(int(counts[:rank].sum()), int(counts.sum()))


def _kernels(backend: str | None, args: tuple) -> Any:
    name = backend or choice.name
    found = {"cpu": cpu, "triton": triton}
    reasons = []
    for run in chunked.BACKENDS:
        reason = run.missing or run.supports(*args)
        if reason is None and name in (None, "auto", run.name):
            return found[run.name]
        reasons.append(f"  {run.name}: {reason or 'can serve it'}")
    raise UnsupportedError(
        "\n".join([f"process_group: no backend ({name or 'auto'}) serves a shard", *reasons])
    )


class _Sharded(torch.autograd.Function):
    """The tokens' losses, float32, from each process' shard."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Any,
        kernels: Any,
        shard: Shard,
        o: spec.LinearOptions,
        target: Tensor,
        class_weight: Tensor | None,
        *tensors: Any,
    ) -> Tensor:
        head = chunked.head_of(*tensors)
        steps = spec.plan(head.input, head.weight, o.chunk_bytes)
        target, weights = target.contiguous(), kernels.prepared(class_weight)
        sums, own = chunked.forward_by_parts(
            kernels, head, target, weights, o.rows, steps, shard, keep=o.skip_below > 0
        )
        local = own[0] if own.dim() > 1 else own
        top = local.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        base = torch.where(top == -float("inf"), 0.0, top)
        both = torch.stack([sums, (local - base).exp()])
        dist.all_reduce(both, group=group)
        lse = base + both[1].log()
        ctx.call = group, kernels, shard, o, steps
        kept = torch.cat([lse[None], own[1:]]) if own.dim() > 1 else lse
        ctx.save_for_backward(target, weights, kept, *tensors)
        losses = chunked.token_losses(both[0], lse, target, weights, o.rows, shard.classes)
        return losses.to(torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        group, kernels, shard, o, steps = ctx.call
        target, weights, lse, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        found = chunked.backward_by_parts(
            kernels, chunked.head_of(*tensors), grad.float().contiguous(), target, weights, lse,
            o.rows, steps, shard, needs, o.skip_below,
        )  # fmt: skip
        for i in (0, 3):  # every process has the whole input and its part of the classes
            whole = found[i]
            if whole is not None:
                total = whole.float()
                dist.all_reduce(total, group=group)
                found[i] = total.to(whole.dtype)
        return (None,) * 6 + tuple(found)
