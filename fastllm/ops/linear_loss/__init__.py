"""linear_cross_entropy: the head's product and its loss, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.ops.linear_loss import chunked, parallel, reference, spec
from fastllm.ops.linear_loss.cases import cases
from fastllm.ops.loss import stock


def _stock(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    *options: Any,
) -> Tensor:
    """F.linear and F.cross_entropy."""
    logits = F.linear(input, weight, bias)
    if low is not None and up is not None:
        logits = logits + F.linear(low, up)
    loss = stock.cross_entropy(logits, target, class_weight, *options[:6])
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def _serves(input: Tensor, *_: Any) -> None:
    spec.require_float("input", input)


linear_cross_entropy_op = define(
    "linear_cross_entropy",
    (*chunked.BACKENDS, Backend("torch", _stock, supports=_serves)),
    reference,
    family="loss",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3, 4, 5, 6),
    saved=lambda args, out: (*args[:7], out[1], out[2] if len(out) > 2 else None, *args[7:]),
    saved_tensors=(0, 1, 2, 3, 4, 5, 6, 7),
    forward_args=lambda saved: (*saved[:7], *saved[9:]),
    gradients={0: 0, 1: 1, 3: 2, 5: 3, 6: 4},
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    hidden=1,
    cost=spec.cost,
    cases=cases(),
    autocast_composite=("cpu", "cuda"),
)


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    lora_input: Tensor | None = None,
    chunk_bytes: int = 32 << 20,
    skip_below: float = 0.0,
    dtype: torch.dtype | None = None,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target) with at most chunk_bytes of logits.

    A tied embedding is a weight like any other.

    input          [..., H]; weight [C, H] and bias [C] or None, of input's dtype
    target         [...] class indices, int64
    class_weight   [C] or None; it and the other options as in `cross_entropy`
    lora_a, lora_b [r, H] and [C, r]: the weight is weight + lora_scale * lora_b @ lora_a (Hu et al.
                   2021), which is never formed; both get gradients, weight does if it wants them.
                   Of any float dtype: lora_a is applied in its own
    lora_input     what lora_a reads, of input's shape (dropout's output); None: input
    chunk_bytes    bound on the logits that exist at once (never less than those of one token, or of
                   256 classes of it); beyond it there are the gradients, in float32 where several
                   steps add to one
    skip_below     0: exact. Else backward leaves out classes, a block at a time, where no token has
                   its target, or this much probability in all: the gradient of a token's logits is
                   then off by less than skip_below (sum of absolute values) for each block left
                   out. The loss stays exact; with label_smoothing, nothing is left out
    dtype          of the loss; None: input's (float32 under autocast)
    process_group  weight, bias and lora_b are this process' shard of the classes, in the order of
                   ranks; input and target are the same in every process, class_weight is of all
                   classes. Every process gets the loss, and the whole gradient of input

    Returns the loss, reduced or of target's shape. Raises ValueError or TypeError for arguments
    that do not fit, IndexError for a class out of range on the CPU.
    """
    spec.require_float("input", input)
    spec.require_float("weight", weight)
    kind = casting(input)
    if kind is not None:
        input, weight, bias, lora_a, lora_b, lora_input = cast(
            kind, input, weight, bias, lora_a, lora_b, lora_input
        )
        with torch.autocast(kind, enabled=False):
            return linear_cross_entropy(
                input, weight, target, bias, class_weight=class_weight, ignore_index=ignore_index,
                reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
                softcap=softcap, logit_scale=logit_scale, lora_a=lora_a, lora_b=lora_b,
                lora_scale=lora_scale, lora_input=lora_input, chunk_bytes=chunk_bytes,
                skip_below=skip_below, dtype=dtype or torch.float32, process_group=process_group,
                backend=backend,
            )  # fmt: skip
    if isinstance(target, Tensor) and target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected shape {list(input.shape[:-1])}, found {list(target.shape)}"
        )
    x = input.reshape(-1, input.shape[-1])
    low, up = _low_rank(x, lora_a, lora_b, lora_scale, lora_input)
    save_gradient = (
        reduction != "none"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(t is not None and t.requires_grad for t in (x, weight, bias, low, up))
    )
    flat = target.reshape(-1) if isinstance(target, Tensor) else target
    args = (
        x, weight, flat, bias, class_weight, low, up, ignore_index, reduction,
        float(label_smoothing), float(z_loss), float(softcap), float(logit_scale),
        int(chunk_bytes), float(skip_below), save_gradient,
    )  # fmt: skip
    if process_group is None:
        loss = linear_cross_entropy_op(*args, backend=backend)
    else:
        loss = parallel.linear_cross_entropy(process_group, backend, *args)
    loss = loss.to(dtype or input.dtype)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _low_rank(
    x: Tensor, a: Tensor | None, b: Tensor | None, scale: float, given: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The op's low [tokens, r] and up [C, r]."""
    if (a is None) != (b is None):
        raise ValueError("lora_a and lora_b: expected both or neither")
    if a is None or b is None:
        if given is not None:
            raise ValueError("lora_input: expected None without lora_a and lora_b, found a tensor")
        return None, None
    if given is not None and (given.numel() != x.numel() or given.shape[-1] != x.shape[-1]):
        raise ValueError(
            f"lora_input: expected input's shape ({list(x.shape)} when flattened), "
            f"found {list(given.shape)}"
        )
    read = x if given is None else given.reshape(x.shape)
    return (F.linear(read.to(a.dtype), a) * scale).to(x.dtype), b.to(x.dtype)


def token_log_probs(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """log p(target) of each token, 0 where ignored: what every preference loss is made of.

    Arguments as for `linear_cross_entropy`; returns target's shape.
    """
    return -linear_cross_entropy(
        input, weight, target, bias, ignore_index=ignore_index, reduction="none", **options
    )
