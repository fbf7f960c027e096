"""swap(unpad=True): the layers of an encoder see the tokens of a padded batch, not its padding.

Before the first layer the tokens that the mask shows are laid one after the other, [1, tokens, E];
attention keeps the sequences apart (attention_varlen), and everything else in such a layer treats
each token alone. After the last layer they go back to where they were, with zeros between them.

That everything treats each token alone is proven: every module without children is of a kind known
to do so, and a layer gives the same for packed sequences as for padded ones, in float64. Calls that
are about anything but tokens and padding (a cache, hooks inside, attention weights or hidden states
asked for, a mask that is not padding, torch.compile) go the way they always went.
"""

import copy
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.proof import relative_error
from fastllm.nn.attention import visible_keys
from fastllm.nn.hooks import observed
from fastllm.swap import classes
from fastllm.swap.activations import activation_of
from fastllm.swap.attention import Attention, Packing, Unsuited
from fastllm.swap.bare import bare, isolated
from fastllm.swap.handle import Handle
from fastllm.swap.report import Row

KIND = "padding"
_ALONE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity, nn.Tanh)  # token by token
_AGREES = 1e-9
_WORTH = 0.9  # share of tokens from which on moving them costs more than padding


@dataclass(frozen=True)
class Unpad:
    """The recipe of an encoder's stack of layers."""

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: Any) -> dict[str, Any]:
        stock = base.forward
        names = list(inspect.signature(stock).parameters)[1:3]

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            rest = {n: v for n, v in kwargs.items() if n not in names}
            hidden, mask = (given.get(n) for n in names)
            seen = _padding(self, hidden, mask, (*args[2:], *rest.values()))
            if seen is not None and hidden is not None:
                try:
                    return _packed(stock, self, hidden, seen, args[2:], rest)
                except Unsuited:
                    pass
            return stock(self, *args, **kwargs)

        return {"forward": forward}


def _padding(module: Any, hidden: Any, mask: Any, rest: tuple[Any, ...]) -> Tensor | None:
    """Which tokens [B, T] are none; None: this call is not about padding, or has too little."""
    if torch.compiler.is_compiling() or type(hidden) is not Tensor or type(mask) is not Tensor:
        return None
    if not hidden.is_cpu or hidden.dim() != 3 or mask.dim() != 4 or mask.requires_grad:
        return None
    if any(not isinstance(x, bool | int | float | str | None) for x in rest):
        return None
    batch, length = hidden.shape[:2]
    if mask.shape[0] != batch or mask.shape[1] != 1 or mask.shape[3] != length:
        return None
    row = mask[:, :, :1]
    if mask.shape[2] != 1 and mask.stride(2) and not bool((mask == row).all()):
        return None
    seen: Tensor | None = row
    if mask.dtype != torch.bool:
        seen = visible_keys(row)
    elif not bool(row.any(-1).all()):
        return None  # a sequence without a token
    if seen is None or int(seen.sum()) > _WORTH * seen.numel() or not _unwatched(module):
        return None
    return seen[:, 0, 0]


def _unwatched(module: Any) -> bool:
    """Whether nobody looks at what is inside, and attention is still the one that was proven."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(capturing, "_active_collector", None)
    if active is not None and active.get():
        return False
    if getattr(getattr(module, "config", None), "chunk_size_feed_forward", 0):
        return False
    for inner in module.modules():
        recipe = classes.recipe_of(inner)
        if isinstance(recipe, Attention) and not _usual(inner):
            return False
        if inner is not module and observed(inner, _sleeps):
            return False
    return True


def _usual(attention: Any) -> bool:
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    return name in (None, "eager", "sdpa")


def _sleeps(hook: Any) -> bool:
    """Whether it is one of transformers' own recorders, which do nothing unless asked to."""
    return "output_capturing" in str(getattr(hook, "__module__", ""))


def _packed(
    stock: Any, module: Any, hidden: Tensor, seen: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Any:
    lengths = seen.sum(1)
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = lengths.cumsum(0)
    where = seen.reshape(-1).nonzero().squeeze(1)
    tokens = hidden.flatten(0, 1).index_select(0, where).unsqueeze(0)
    out = stock(module, tokens, Packing(ends, int(lengths.max())), *args, **kwargs)
    name, value = _only_tensor(out, tokens)
    back = value.new_zeros((seen.numel(), value.shape[2])).index_copy(0, where, value[0])
    back = back.unflatten(0, tuple(seen.shape))
    if name is None:
        return back
    out[name] = back
    return out


def _only_tensor(out: Any, tokens: Tensor) -> tuple[str | None, Tensor]:
    """The hidden states among what a stack gives back; Unsuited if there is anything else."""
    name = None
    if isinstance(out, dict):
        given = {n: v for n, v in out.items() if v is not None}
        if len(given) != 1:
            raise Unsuited
        ((name, out),) = given.items()
    if not isinstance(out, Tensor) or out.shape[:2] != tokens.shape[:2] or out.dim() != 3:
        raise Unsuited
    return name, out


# ---- where, and the proof


def unpad(handle: Handle, paths: Any, allowed: set[nn.Module]) -> list[Row]:
    """Makes every stack of encoder layers skip padding; ValueError if there is none."""
    found = [(p, m) for m, (p, *_) in paths.items() if m in allowed and _is_stack(m)]
    if not found:
        name = type(handle.model).__name__
        raise ValueError(
            f"unpad: expected an encoder whose attention is swapped, found none in {name}"
        )
    rows = []
    for path, module in found:
        row = Row(path, type(module).__name__, new="without padding", kind=KIND)
        row.reason = classes.unfit(module) or _obstacle(module)
        if row.reason:
            row.new = ""
        else:
            handle.change(path, module, Unpad())
        rows.append(row)
    return rows


def _layers(module: Any) -> tuple[str, nn.ModuleList] | None:
    lists = [(n, c) for n, c in module._modules.items() if isinstance(c, nn.ModuleList) and len(c)]
    return lists[0] if len(lists) == 1 else None


def _attentions(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(classes.recipe_of(m), Attention))


def _is_stack(module: Any) -> bool:
    """A list of layers with swapped attention, called with hidden states and a mask."""
    layers = _layers(module)
    if layers is None or not all(any(True for _ in _attentions(x)) for x in layers[1]):
        return False
    names = list(inspect.signature(classes.original(module).forward).parameters)[1:3]  # type: ignore[attr-defined]
    return names[:1] in (["hidden_states"], ["inputs_embeds"]) and names[1:] == ["attention_mask"]


def _obstacle(module: Any) -> str:
    """Why padding cannot be skipped in it; "" if it can."""
    if classes.recipe_of(module) is not None:
        return "something else was swapped in it"
    for path, inner in module.named_modules():
        if not inner._modules and not _token_by_token(inner):
            return f"{path}: a {type(inner).__name__} may look at more than one token"
        if inner._modules and any(p is not None for p in inner._parameters.values()):
            return f"{path}: parameters of its own"
    name, layers = _layers(module) or ("", nn.ModuleList())
    if len({_form(layer) for layer in layers}) > 1:
        return "its layers differ"
    return _disagreement(module, name, layers)


def _token_by_token(module: Any) -> bool:
    known = isinstance(module, _ALONE) or activation_of(module) is not None
    return known or type(module).__module__ == "transformers.activations"


def _form(layer: nn.Module) -> tuple:
    """Layers with equal ones compute the same of their parameters."""
    return tuple(
        (path, type(m), tuple(sorted((n, v) for n, v in vars(m).items() if _counts(n, v))))
        for path, m in layer.named_modules()
    )


def _counts(name: str, value: Any) -> bool:
    return isinstance(value, bool | int | float | str) and "idx" not in name and name != "training"


def _disagreement(module: Any, name: str, layers: nn.ModuleList) -> str:
    """One layer in float64, padded and packed."""
    norm = next((m for m in layers[0].modules() if isinstance(m, nn.LayerNorm | nn.RMSNorm)), None)
    if norm is None or norm.weight is None or norm.weight.device.type != "cpu":
        return "its width is not known, or it is not on the CPU"
    stock = classes.original(module).forward  # type: ignore[attr-defined]
    twin = bare(module, False)
    try:
        with isolated(torch.device("cpu")), torch.no_grad():
            twin._modules[name] = nn.ModuleList([copy.deepcopy(layers[0]).double().eval()])
            hidden = torch.randn(4, 6, norm.normalized_shape[-1], dtype=torch.float64)
            seen = torch.arange(6) < torch.tensor([[6], [2], [1], [4]])
            seen[1] = torch.tensor([False, True, False, True, True, False])
            mask = seen[:, None, None].expand(4, 1, 6, 6)
            lowest = torch.finfo(torch.float64).min
            added = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, lowest)
            attention: Any = next(_attentions(layers[0]))
            eager = attention.config._attn_implementation != "sdpa"
            padded = stock(twin, hidden, added if eager else mask)
            packed = _packed(stock, twin, hidden, seen, (), {})
            pair = [_only_tensor(x, hidden)[1] for x in (packed, padded)]
    except Exception as error:  # whatever a stranger's function raises
        return f"it cannot run on packed sequences ({type(error).__name__})"
    if bool(pair[0][~seen].any()) or relative_error(pair[0][seen], pair[1][seen]) > _AGREES:
        return "packed sequences give another result"
    return ""
