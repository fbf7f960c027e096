"""Which linear layers of a model can be quantized, and why the others cannot."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastllm import nn as fast
from fastllm.core.instances import is_bound
from fastllm.core.select import Paths, chosen, paths_of

HEADS = ("lm_head", "embed_out", "output_projection")  # where the model itself does not say
_FORWARDS = (nn.Linear.forward, fast.Linear.forward)


@dataclass(frozen=True)
class Facts:
    """Of a whole model: heads of language models, shared weights, what adapters and attention own.

    shared  id of a weight -> the paths of all modules that hold it
    """

    heads: frozenset[nn.Module]
    shared: dict[int, list[str]]
    adapters: frozenset[nn.Module]
    owned: frozenset[nn.Module]


def candidates(model: nn.Module, include: Any, exclude: Any) -> tuple[Facts, list[tuple[Any, str]]]:
    """The linear layers that the caller's wishes leave, each with its path."""
    paths = paths_of(model)
    allowed = set(paths) if include is None else chosen(model, paths, "include", include)
    barred = set() if exclude is None else chosen(model, paths, "exclude", exclude)
    found = [(m, names[0]) for m, names in paths.items() if m in allowed and m not in barred]
    return facts(paths), [(m, path) for m, path in found if is_linear(m)]


def facts(paths: Paths) -> Facts:
    """What has to be known of the model before its layers are looked at."""
    holders: dict[int, list[str]] = {}
    heads, adapters, owned = set(), set(), set()
    for module, names in paths.items():
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), []).append(names[0])
        if names[0].rpartition(".")[2] in HEADS:
            heads.add(module)
        heads |= _declared(module)
        base = module._modules.get("base_layer")
        if base is not None:
            adapters |= set(module.modules()) - set(base.modules()) - {module}
        if isinstance(module, nn.MultiheadAttention):
            owned.add(module.out_proj)
    shared = {i: names for i, names in holders.items() if len(names) > 1}
    return Facts(frozenset(heads), shared, frozenset(adapters), frozenset(owned))


def _declared(module: Any) -> set[nn.Module]:
    """The output layer that a transformers model names."""
    ask = getattr(module, "get_output_embeddings", None)
    if not callable(ask):
        return set()
    try:
        found = ask()
    except Exception:  # models that have none say so in many ways
        return set()
    return {found} if isinstance(found, nn.Module) else set()


def check_share(amount: float) -> None:
    """TypeError or ValueError for what is no share of weights, channels or heads."""
    if not isinstance(amount, int | float):
        raise TypeError(f"amount: expected a number, found {type(amount).__name__}")
    if not 0 <= amount < 1:
        raise ValueError(f"amount: expected a share in [0, 1), found {amount!r}")


def kind_of(module: nn.Module) -> type:
    """The class that a module had before a swap."""
    return vars(type(module)).get("_fastllm_base", type(module))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is GPT-2's linear, which keeps its weight transposed."""
    cls = kind_of(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def oriented(linear: Any) -> Tensor:
    """The weight as [out_features, in_features]; Conv1D keeps it transposed."""
    return linear.weight if isinstance(linear, nn.Linear) else linear.weight.t()


def is_linear(module: nn.Module) -> bool:
    """What the report has a row for."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def why_not(module: Any, known: Facts, head: bool) -> str | None:
    """Why a linear layer is left alone, or None."""
    if module._buffers.get("format_code") is not None:
        return "already quantized"
    if module in known.adapters:
        return "an adapter"
    if module in known.owned:
        return "torch.nn.MultiheadAttention reads its weight itself"
    pristine = kind_of(module) in (nn.Linear, fast.Linear) and type(module).forward in _FORWARDS
    if not pristine and not is_conv1d(module):
        return "a subclass of Linear, with a forward of its own"
    forward = vars(module).get("forward")
    if forward is not None and not is_bound(forward, module, type(module).forward):
        accelerate = "_hf_hook" in vars(module) and "_old_forward" in vars(module)
        if not accelerate:
            return "its forward was overridden on the instance"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed (pruning or weight_norm): make it permanent first"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if weight.numel() == 0:
        return "its weight is empty"
    if module in known.heads and not head:
        return "the output layer (Config(head=True) includes it)" + _tied(module, known)
    if id(weight) in known.shared and module not in known.heads:
        return f"its weight is shared: {', '.join(known.shared[id(weight)])}"
    return None


def too_small(module: Any, least: int) -> str | None:
    """Why a layer of fewer than `least` weights is left alone, or None."""
    count = module.weight.numel()
    return f"{count} weights: faster in float" if count < least else None


def why_not_own(module: Any, known: Facts, head: bool, own: type, done: str) -> str | None:
    """The same, for what makes a Linear, and no Conv1D, an `own`: `done` says that it is one."""
    if isinstance(module, own):
        return done
    if is_conv1d(module):
        return "Conv1D: its weight is transposed"
    return why_not(module, known, head)


def _tied(module: Any, known: Facts) -> str:
    names = known.shared.get(id(module.weight))
    return f"; tied: {', '.join(names)}" if names else ""


def untied(module: Any, known: Facts) -> str:
    """What to say of a layer that no longer shares its weight, once it has codes."""
    names = known.shared.get(id(module._parameters["weight"]))
    return f"no longer tied: {', '.join(names)}; the others keep the float weight" if names else ""
