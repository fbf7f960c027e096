"""The attention function of Hugging Face modules, replaced by fastllm's.

    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    ->  attention = self._fastllm_attention(ALL_ATTENTION_FUNCTIONS.get_interface(...))

What the config asks for is looked up where it always was. Only two functions are ours to replace:
the library's "sdpa", and the very eager function that was proven on random input. Masks, config
and caches stay the model's own, so everything that reads them goes on as before.
"""

import ast
import dis
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import functional as F
from fastllm.core.proof import relative_error
from fastllm.nn.attention import visible_keys, worth_attention
from fastllm.swap import rotary
from fastllm.swap.bare import isolated
from fastllm.swap.probe import AGREES
from fastllm.swap.recompile import Unfusable, plain_forward, rewritten

TABLE, LOOKUP, EAGER = "ALL_ATTENTION_FUNCTIONS", "get_interface", "eager_attention_forward"
METHOD = "_fastllm_attention"
NAME = "fastllm"
_SDPA = "transformers.integrations.sdpa_attention"
_USUAL = {"module", "query", "key", "value", "attention_mask", "scaling", "dropout"}
_EXTRAS = ("softcap", "position_bias", "s_aux")
Result = tuple[Tensor, None]


class Unsuited(Exception):
    """A call that cannot be made on packed sequences."""


@dataclass(frozen=True)
class Packing:
    """Stands for the mask of a batch whose sequences lie one after the other (unpad.py).

    No other attention function takes it, so none can take packed sequences for a single one.
    """

    ends: Tensor
    longest: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any],
               dropout: float, backend: str | None) -> Result:  # fmt: skip
        """As `attend`, on [1, H, tokens, D]."""
        extra = (*_EXTRAS, "cache", "head_mask", "output_attentions")
        alone = query.shape[0] == 1 and query.shape[2] == key.shape[2]
        if not alone or any(options.get(n) is not None for n in extra) or _weights_recorded():
            raise Unsuited
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = F.attention_varlen(
            q, k, v, self.ends, self.ends, self.longest, self.longest, dropout_p=dropout,
            scale=options.get("scaling"), backend=backend,
        )  # fmt: skip
        return out.unsqueeze(0), None


@dataclass(frozen=True)
class Attention:
    """The recipe of an attention module.

    rotary  what is done about its rotation of queries and keys
    eager   which extras its eager function knows, as proven; None: it is left alone
    """

    rotary: rotary.Rotary | None
    eager: frozenset[str] | None
    backend: str | None = None

    def bases(self, base: type) -> tuple[type, ...]:
        return (base,)

    def namespace(self, base: type) -> dict[str, Any]:
        made = {} if self.rotary is None else self.rotary.namespace(base)
        turn = self.rotary if made else None
        try:
            forward = plain_forward(base)
            made["forward"] = rewritten(forward, lambda node: _changed(node, turn))
        except Unfusable:  # a pickle loaded where the source is another one
            return made
        eager = forward.__globals__.get(EAGER) if self.eager is not None else None
        made[METHOD] = staticmethod(_replace(eager, self.eager or frozenset(), self.backend))
        return made


def looks_up(base: Any) -> bool:
    """Whether forward takes its attention function from transformers' table."""
    forward = inspect.unwrap(base.forward)
    return isinstance(forward, FunctionType) and {TABLE, LOOKUP} <= set(forward.__code__.co_names)


def signature(module: Any) -> Any:
    """Modules with equal ones have one recipe."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    sinks = getattr(module, "sinks", None)
    heads = sinks.numel() if isinstance(sinks, Tensor) else None
    groups = getattr(module, "num_key_value_groups", None)
    return "attention", type(module), name, groups, heads


def identify(module: Any, turn: rotary.Rotary | None, backend: str | None) -> Attention:
    """The recipe for a module that `looks_up`; Unfusable says why there is none."""
    forward = plain_forward(type(module))
    rewritten(forward, lambda node: _changed(node, turn))
    register()
    eager = forward.__globals__.get(EAGER)
    known = None if eager is None else _extras(eager, module)
    name = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if name not in (None, "eager", "sdpa"):
        raise Unfusable(f"its config asks for {name}")
    if known is None and name != "sdpa":
        raise Unfusable("its eager function computes something else")
    return Attention(turn, known, backend)


def _changed(node: ast.FunctionDef, turn: rotary.Rotary | None) -> ast.FunctionDef:
    if turn is not None:
        node = rotary._redirect(node, turn.function)
    first = [*node.args.posonlyargs, *node.args.args][:1]
    if not first:
        raise Unfusable("its forward has no self")
    return _Redirect(first[0].arg).visit(node)


class _Redirect(ast.NodeTransformer):
    """Hands what the table gives to self's method."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        f = node.func
        table = isinstance(f, ast.Attribute) and f.attr == LOOKUP and isinstance(f.value, ast.Name)
        if not table or f.value.id != TABLE:  # type: ignore[attr-defined]
            return node
        method = ast.Attribute(ast.Name(self.owner, ast.Load()), METHOD, ast.Load())
        return ast.copy_location(ast.Call(method, [node], []), node)


def _replace(eager: Any, extras: frozenset[str], backend: str | None) -> Callable[..., Any]:
    stock: Any = getattr(sys.modules.get(_SDPA), "sdpa_attention_forward", None)
    fused = functools.partial(attend, stock, None, backend)
    known = functools.partial(attend, eager, extras, backend)

    def replace(found: Any) -> Any:
        if found is stock:
            return fused
        return known if found is eager else found

    return replace


# ---- what runs


def attend(
    stock: Callable[..., Any],
    eager: frozenset[str] | None,
    backend: str | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None = None,
    **options: Any,
) -> Any:
    """Stock's arguments and result: (out [B, T, H, D], None); `stock` where it is the better one.

    eager  the extras that `stock` knows, if it is an eager function: those take a mask for
           everything that is not to be seen, and module.sinks
    """
    if isinstance(attention_mask, Packing):
        if eager is not None and "sinks" in eager:
            raise Unsuited
        dropout = options.get("dropout") or 0.0 if eager is None or module.training else 0.0
        return attention_mask.attend(query, key, value, options, dropout, backend)
    get = options.get
    softcap, bias, sinks = get("softcap"), get("position_bias"), get("s_aux")
    if eager is not None and "sinks" in eager:
        sinks = module.sinks
    mask, causal = attention_mask, get("is_causal")
    if eager is None:
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = bool(causal) and mask is None and query.shape[2] > 1
    else:
        causal = False
    if not (
        _plain(query, key, value, mask, bias)
        and _understood(eager, options, softcap, bias, sinks)
        and (
            backend
            or reads_codes(query, key, mask, bias)
            or worth_attention(query, key, value, mask, causal, softcap or 0.0, sinks)
        )
    ):
        return stock(module, query, key, value, attention_mask, **options)
    return _attention(
        module, query, key, value, mask, bias, causal, softcap, sinks, backend, options,
        eager is None,
    )  # fmt: skip


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    bias: Tensor | None, causal: bool, softcap: float | None, sinks: Tensor | None,
    backend: str | None, options: dict[str, Any], always: bool,
) -> Result:  # fmt: skip
    if reads_codes(query, key, mask, bias):
        out = _step(query, key, value, softcap, sinks, backend, options)
        return out.transpose(1, 2).contiguous(), None
    if bias is not None:
        mask = bias if mask is None else _biased(bias, mask)
    elif mask is not None and mask.dtype != torch.bool and _hides_keys(mask):
        seen = visible_keys(mask[:, :1, :1])
        mask = mask if seen is None else seen
    dropout = options.get("dropout") or 0.0
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout if always or module.training else 0.0, causal,
        options.get("scaling"), True, softcap=softcap or 0.0, sinks=sinks, backend=backend,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def reads_codes(query: Tensor, key: Any, mask: Any, bias: Any) -> bool:
    """Whether the keys are of a quantized cache, whose codes one query can read as they are."""
    alone = query.shape[2] == 1 and mask is None and bias is None
    return (
        alone and hasattr(key, "stored") and not (torch.is_grad_enabled() and query.requires_grad)
    )


def _step(
    query: Tensor, key: Any, value: Any, softcap: float | None, sinks: Tensor | None,
    backend: str | None, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    used = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    return F.attention_with_kv_cache(
        query, key.stored(), value.stored(), used, scale=options.get("scaling"),
        softcap=softcap or 0.0, sinks=sinks, backend=backend,
    )  # fmt: skip


def _biased(bias: Tensor, mask: Tensor) -> Tensor:
    """As transformers joins them: hidden is the lowest number, not -inf."""
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _hides_keys(mask: Tensor) -> bool:
    """Whether all queries and heads share a row of the mask, as padding makes it."""
    rows = mask.shape[2] == 1 or mask.stride(2) == 0
    return rows and (mask.shape[1] == 1 or mask.stride(1) == 0)


def _plain(query: Any, key: Any, value: Any, mask: Any, bias: Any) -> bool:
    """Whether the tensors are of the kinds and shapes that were proven."""
    if not (isinstance(query, Tensor) and query.dim() == key.dim() == value.dim() == 4):
        return False
    kind = query.dtype
    if key.dtype != kind or value.dtype != kind or not kind.is_floating_point:
        return False
    if query.shape[0] != key.shape[0] or not key.shape[1] or query.shape[1] % key.shape[1]:
        return False
    full = (*query.shape[:3], key.shape[2])
    return all(
        m is None
        or (
            m.dim() == 4
            and m.dtype in (torch.bool, kind, torch.float32)
            and all(a in (1, b) for a, b in zip(m.shape, full, strict=True))
        )
        for m in (mask, bias)
    )


def _understood(
    eager: frozenset[str] | None, options: dict[str, Any], softcap: Any, bias: Any, sinks: Any
) -> bool:
    """Whether stock would do with the options what we do."""
    if options.get("cache") is not None or options.get("head_mask") is not None:
        return False
    if options.get("output_attentions") or (eager is not None and _weights_recorded()):
        return False
    if eager is None:
        return softcap is None and sinks is None
    given = {"softcap": softcap, "position_bias": bias}
    known = all(v is None or n in eager for n, v in given.items())
    return known and (sinks is None or "sinks" in eager) and options.get("scaling") is not None


def _weights_recorded() -> bool:
    """Whether transformers is collecting attention weights around this call."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(capturing, "_active_collector", None)
    recorded = None if active is None else active.get()
    return recorded is not None and any("attention" in str(name) for name in recorded)


# ---- the proof of an eager function


def _extras(eager: Any, module: Any) -> frozenset[str] | None:
    """The extras that an eager function computes as we do; None: it computes something else."""
    if not isinstance(eager, FunctionType):
        return None
    parameters = inspect.signature(eager).parameters
    rest = [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    named = set(parameters) - set(rest)
    used = {i.argval for i in dis.get_instructions(eager) if i.opname == "LOAD_FAST"}
    if not named - _USUAL <= set(_EXTRAS) or used & set(rest) or not rest:
        return None
    sinks = getattr(module, "sinks", None)
    extras = named & {"softcap", "position_bias"}
    extras |= {"sinks"} if isinstance(sinks, Tensor) else set()
    first = next(module.parameters(), None)
    if first is None or first.is_meta:
        return None
    with isolated(torch.device("cpu")):
        for extra in (None, *sorted(extras)):
            if not _agrees(eager, module, extra, sinks, first.device):
                return None
    return frozenset(extras)


def _agrees(
    eager: FunctionType, module: Any, extra: str | None, sinks: Any, device: torch.device
) -> bool:
    groups = getattr(module, "num_key_value_groups", 1)
    heads = sinks.numel() if isinstance(sinks, Tensor) else 2 * groups
    shapes = ((heads, 3), (heads // groups, 4), (heads // groups, 4))
    q, k, v = (torch.randn(2, h, n, 8, device=device, requires_grad=True) for h, n in shapes)
    mask = torch.randn(2, 1, 3, 4, device=device)
    given: dict[str, Any] = {}
    if extra == "softcap":
        given[extra] = 1.5
    elif extra == "position_bias":
        given[extra] = torch.randn(1, heads, 3, 4, device=device)
    added = mask + given["position_bias"] if extra == "position_bias" else mask
    try:
        found = eager(module, q, k, v, mask, scaling=0.3, dropout=0.0, **given)[0]
        right = F.scaled_dot_product_attention(
            q, k, v, added, scale=0.3, enable_gqa=True, softcap=given.get("softcap", 0.0),
            sinks=sinks, backend="reference",
        ).transpose(1, 2)  # fmt: skip
        upstream = torch.randn_like(right)
        pairs = [(found, right)]
        slopes = (torch.autograd.grad(x, [q, k, v], upstream) for x in (found, right))
        pairs += zip(*slopes, strict=True)
        return all(
            a.shape == b.shape and relative_error(a.detach(), b.detach().double()) < AGREES
            for a, b in pairs
        )
    except Exception:  # whatever a stranger's function raises
        return False


# ---- by name, without a swap


def register() -> None:
    """Makes `attn_implementation="fastllm"` known to transformers, if that is loaded."""
    models = sys.modules.get("transformers.modeling_utils")
    masks = sys.modules.get("transformers.masking_utils")
    if models is None or masks is None or NAME in models.ALL_ATTENTION_FUNCTIONS:
        return
    models.ALL_ATTENTION_FUNCTIONS.register(NAME, by_name)
    masks.ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, masks.sdpa_mask)


def by_name(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Result:
    """fastllm's attention, softcap, sinks and bias included, as a model's own choice."""
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    bias, sinks = options.get("position_bias"), options.get("s_aux")
    return _attention(
        module, query, key, value, attention_mask, bias, causal, options.get("softcap"), sinks,
        None, options, True,
    )  # fmt: skip
