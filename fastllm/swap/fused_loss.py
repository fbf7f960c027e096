"""fused_loss=True: a Hugging Face causal LM whose labels= path never holds its logits.

The model's forward is its own. While it runs with labels, its head answers with LazyLogits, and its
loss_function, given these, computes the loss from the hidden states. In a compiled step they are
Deferred. Whatever is unusual (a loss of the user's own, a head that is sharded or that heads.py
does not know) takes the stock path.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import functional as fast
from fastllm.swap import classes, heads
from fastllm.swap.deferred import Deferred
from fastllm.swap.heads import Head
from fastllm.swap.lazy import LazyLogits, Source, plain, scale_and_cap
from fastllm.swap.report import Row


@dataclass(frozen=True)
class FusedLoss:
    """The same class with another loss behind labels=."""

    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        backend, stock, names = self.backend, base.forward, list(_parameters(base.forward))
        place = names.index("labels") - 1
        getter, setter = base.loss_function.fget, base.loss_function.fset
        stock_loss = _stock_loss()

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            labels = args[place] if place < len(args) else kwargs.get("labels")
            parts = None if labels is None else _parts(self)
            if parts is None:
                return stock(self, *args, **kwargs)
            head = self.get_output_embeddings()
            own = head.forward

            def lazily(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if args or kwargs:
                    return own(hidden, *args, **kwargs)
                return _lazy(head, parts, hidden)

            vars(head)["forward"] = lazily
            try:
                return stock(self, *args, **kwargs)
            finally:
                vars(head).pop("forward", None)

        def loss_function(self: Any) -> Any:
            found = getter(self)
            return functools.partial(_loss, found, backend) if found is stock_loss else found

        def set_loss_function(self: Any, value: Any) -> None:
            setter(self, value)

        return {"forward": forward, "loss_function": property(loss_function, set_loss_function)}


def find(path: str, module: nn.Module, backend: str | None) -> tuple[FusedLoss | None, Row] | None:
    """The recipe for a causal LM, or a row with the reason; None: it is no such model."""
    if not hasattr(type(module), "get_output_embeddings") or "lm_head" not in module._modules:
        return None  # PEFT's wrappers pass on attributes of the model inside
    row = Row(path, type(module).__name__, kind="loss")
    row.reason = _why_not(module) or classes.unfit(module) or ""
    if row.reason:
        return None, row
    row.new, row.backend = "fastllm linear_cross_entropy", backend or "auto"
    return FusedLoss(backend), row


def _why_not(module: Any) -> str | None:
    if classes.recipe_of(module) is not None:
        return "already swapped"
    if not isinstance(getattr(type(module), "loss_function", None), property):
        return "its class has no loss_function"
    if module.loss_function is not _stock_loss():
        return "its loss is not transformers' ForCausalLMLoss"
    if "labels" not in _parameters(type(module).forward):
        return "its forward takes no labels"
    parts = heads.find(module.get_output_embeddings())
    return parts if isinstance(parts, str) else None


def _parameters(forward: Any) -> Any:
    return inspect.signature(forward).parameters


@functools.cache
def _stock_loss() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _parts(model: Any) -> Head | None:
    """The head's, where its logits may be left out; None: they may not."""
    parts = heads.find(model.get_output_embeddings())
    if isinstance(parts, str) or torch.jit.is_tracing():
        return None
    return parts if all(map(plain, parts.tensors)) else None


def _lazy(module: nn.Module, parts: Head, hidden: Tensor) -> Any:
    """module(hidden), not yet."""
    dtype, kind = hidden.dtype, hidden.device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    if autocast[0]:
        dtype = autocast[1]
    elif dtype != parts.linear.weight.dtype:
        return type(module).forward(module, hidden)
    if not plain(hidden):
        return type(module).forward(module, hidden)
    source = Source(module, parts, parts.dropped(hidden), autocast)
    if torch.compiler.is_compiling():
        return Deferred(hidden, source, dtype)
    return LazyLogits(hidden, source, (), dtype)


def _loss(
    stock: Any,
    backend: str | None,
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, from the hidden states where the logits were left out."""
    deferred = isinstance(logits, Deferred)
    pending = deferred or (isinstance(logits, LazyLogits) and logits.pending)
    steps = scale_and_cap(logits.steps) if pending else None
    if steps is None or vocab_size != logits.shape[-1]:
        if deferred:
            logits = logits.tensor()
        elif isinstance(logits, LazyLogits):
            logits = logits.computed()
        return stock(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, source = logits.hidden, logits.source
    head = source.head.linear
    mean = num_items_in_batch is None
    loss = fast.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head.weight,
        shift_labels.reshape(-1).to(hidden.device),
        head.bias,
        ignore_index=ignore_index,
        reduction="mean" if mean else "sum",
        logit_scale=steps[0],
        softcap=steps[1],
        dtype=torch.promote_types(hidden.dtype, torch.float32),
        backend=backend,
        **source.head.loss_arguments(source.dropped),
    )
    if mean:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
