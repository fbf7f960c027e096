"""fused_loss=True: a Hugging Face causal LM whose labels= path never holds its logits.

The model's forward is its own. While it runs with labels, its head answers with LazyLogits, and its
loss_function, given these, computes the loss from the hidden states. Whatever is unusual (a loss
of the user's own, a head that is sharded or wrapped, torch.compile) takes the stock path.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import functional as fast
from fastllm.nn.linear import Linear
from fastllm.swap import classes
from fastllm.swap.lazy import LazyLogits, plain, scale_and_cap
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

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            labels = args[place] if place < len(args) else kwargs.get("labels")
            head = None if labels is None or torch.compiler.is_compiling() else _head(self)
            if head is None:
                return stock(self, *args, **kwargs)
            own = head.forward
            vars(head)["forward"] = lambda hidden: _lazy(head, own, hidden)
            try:
                return stock(self, *args, **kwargs)
            finally:
                vars(head).pop("forward", None)

        def loss_function(self: Any) -> Any:
            found = getter(self)
            if torch.compiler.is_compiling() or found is not _stock_loss():
                return found
            return functools.partial(_loss, found, backend)

        def set_loss_function(self: Any, value: Any) -> None:
            setter(self, value)

        return {"forward": forward, "loss_function": property(loss_function, set_loss_function)}


def find(path: str, module: nn.Module, backend: str | None) -> tuple[FusedLoss | None, Row] | None:
    """The recipe for a causal LM, or a row with the reason; None: it is no such model."""
    if not hasattr(module, "get_output_embeddings") or not hasattr(module, "lm_head"):
        return None
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
    return _why_not_head(module.get_output_embeddings())


def _why_not_head(head: Any) -> str | None:
    if not isinstance(head, nn.Linear) or type(head).forward not in _FORWARDS:
        return f"its head is a {type(head).__name__}, not a plain Linear"
    if "forward" in vars(head):
        return "its head's forward was overridden on the instance"
    return None


_FORWARDS = (nn.Linear.forward, Linear.forward)


def _parameters(forward: Any) -> Any:
    return inspect.signature(forward).parameters


@functools.cache
def _stock_loss() -> Any:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss


def _head(model: Any) -> Any:
    """The head, where its logits may be left out; None: they may not."""
    head = model.get_output_embeddings()
    if _why_not_head(head) or torch.jit.is_tracing():
        return None
    ours = all(p is None or plain(p) for p in (head.weight, head.bias))
    return head if ours else None


def _lazy(head: Any, own: Any, hidden: Tensor) -> Tensor:
    """head(hidden), not yet."""
    dtype, kind = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    elif dtype != head.weight.dtype:
        return own(hidden)
    if not plain(hidden):
        return own(hidden)
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def compute() -> Tensor:
        with torch.autocast(kind, dtype=autocast[1], enabled=autocast[0]):
            return own(hidden)

    return LazyLogits(hidden, head, compute, (), dtype)


def _loss(
    stock: Any,
    backend: str | None,
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, from the hidden states where the logits were left out."""
    steps = scale_and_cap(logits.steps) if isinstance(logits, LazyLogits) else None
    if (
        steps is None
        or not isinstance(logits, LazyLogits)
        or not logits.pending
        or vocab_size != logits.shape[-1]
    ):
        given = logits.computed() if isinstance(logits, LazyLogits) else logits
        return stock(
            given, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden, head = logits.hidden, logits.head
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
    )
    if mean:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
