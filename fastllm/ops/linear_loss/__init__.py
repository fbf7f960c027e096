"""linear_cross_entropy: the head's product and its loss, without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.core.dispatch import define
from fastllm.ops.linear_loss import chunked, reference, spec
from fastllm.ops.linear_loss.cases import cases
from fastllm.ops.loss import stock


def _stock(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *options: Any,
) -> Tensor:
    """F.linear and F.cross_entropy."""
    logits = F.linear(input, weight, bias)
    loss: Any = stock.cross_entropy
    return loss(logits, target, class_weight, *options[:6], False, False)


def _serves(input: Tensor, *_: Any) -> None:
    spec.require_float("input", input)


linear_cross_entropy_op = define(
    "linear_cross_entropy",
    (*chunked.BACKENDS, Backend("torch", _stock, supports=_serves)),
    reference,
    family="loss",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3, 4),
    saved=lambda args, out: (*args[:5], out[1], out[2] if len(out) > 2 else None, *args[5:]),
    saved_tensors=(0, 1, 2, 3, 4, 5),
    forward_args=lambda saved: (*saved[:5], *saved[7:]),
    gradients={0: 0, 1: 1, 3: 2},
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
    chunk_bytes: int = 32 << 20,
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target) with at most chunk_bytes of logits.

    Exact: every logit is computed, a chunk of tokens at a time. A tied embedding is a weight like
    any other.

    input         [..., H]; weight [C, H] and bias [C] or None, of input's dtype
    target        [...] class indices, int64
    class_weight  [C] or None; it and the other options as in `cross_entropy`
    chunk_bytes   bound on the logits that exist at once (never less than one token's); beyond it
                  there are the gradients, that of the weight in float32

    Returns the loss in input's dtype (float32 under autocast), reduced or of target's shape. Raises
    ValueError or TypeError for arguments that do not fit, IndexError for a class out of range on
    the CPU.
    """
    spec.require_float("input", input)
    spec.require_float("weight", weight)
    device = input.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        kind = torch.get_autocast_dtype(device)
        cast: list[Any] = [t if t is None else t.to(kind) for t in (input, weight, bias)]
        with torch.autocast(device, enabled=False):
            loss = linear_cross_entropy(
                cast[0], cast[1], target, cast[2], class_weight=class_weight,
                ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
                z_loss=z_loss, softcap=softcap, logit_scale=logit_scale, chunk_bytes=chunk_bytes,
                backend=backend,
            )  # fmt: skip
        return loss.float()
    if isinstance(target, Tensor) and target.shape != input.shape[:-1]:
        raise ValueError(
            f"target: expected shape {list(input.shape[:-1])}, found {list(target.shape)}"
        )
    save_gradient = (
        reduction != "none"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(t is not None and t.requires_grad for t in (input, weight, bias))
    )
    flat = target.reshape(-1) if isinstance(target, Tensor) else target
    loss = linear_cross_entropy_op(
        input.reshape(-1, input.shape[-1]), weight, flat, bias, class_weight, ignore_index,
        reduction, float(label_smoothing), float(z_loss), float(softcap), float(logit_scale),
        int(chunk_bytes), save_gradient, backend=backend,
    )  # fmt: skip
    return loss.reshape(target.shape) if reduction == "none" else loss


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
