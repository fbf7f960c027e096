"""Structured pruning: attention heads and feed-forward channels go, and the model is smaller.

What is left is an ordinary model of ordinary layers: nothing of this library stays in it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.run import as_calls
from fastllm.core.select import chosen, paths_of
from fastllm.quant import calibrate as data
from fastllm.quant.select import check_share, is_conv1d, oriented

# (projections whose rows are the channels, the projection whose columns they are)
FEED_FORWARD = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("linear1",), "linear2"),
    (("lin1",), "lin2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
# (query, key, value, output)
ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("self.query", "self.key", "self.value", "output.dense"),
    (("c_attn",), "c_proj"),
)
_FUSED = {"gate_up_proj": 2, "c_attn": 3}  # projections in one matrix, one above the other
_WIDTHS = ("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner")
_HEAD_DIM = ("head_dim", "attention_head_size")
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class Shrunk:
    """One block: how many channels or heads it had and has; `kept` are their numbers."""

    path: str
    before: int
    after: int
    kept: tuple[int, ...]


def prune_channels(
    model: nn.Module,
    amount: float,
    include: Any = None,
    exclude: Any = None,
    calibrate: Any = None,
) -> list[Shrunk]:
    """Takes that share of the channels between the projections of every feed-forward block.

    Channels go by the norm of what they add to the output: of their weights in the last
    projection, times that of their values on the batches of `calibrate` where it is given, else of
    their rows in the first one. Blocks are known by the usual names of their projections.
    `model.config` follows where all blocks agree. Not reversible: copy first.

    Returns a row for each block. Raises ValueError where there is none.
    """
    check_share(amount)
    blocks = _found(model, FEED_FORWARD, include, exclude)
    downs = [block[-1][1] for block in blocks]
    stats = _stats(model, downs, calibrate)
    rows = []
    for path, _, (inner, down) in blocks:
        before = oriented(down).shape[1]
        kept = _highest(_channel_scores(inner, down, stats.get(down)), amount)
        rows.append(Shrunk(path, before, len(kept), tuple(kept.tolist())))
        for layer in inner:
            _keep_rows(layer, _repeated(kept, layer, before))
        _keep_columns(down, kept)
    _update_config(model, _WIDTHS, {row.after for row in rows})
    return rows


def prune_heads(
    model: nn.Module,
    amount: float,
    include: Any = None,
    exclude: Any = None,
    calibrate: Any = None,
) -> list[Shrunk]:
    """Takes that share of the heads of every attention block; with shared keys, whole groups.

    Heads go by the norm of what they add to the output, as in `prune_channels`. Attention modules
    are those with query, key, value and output projections of the usual names and a `head_dim` (or
    `attention_head_size`), as in transformers. Their numbers of heads and the config's follow.
    Not reversible: copy first.

    Returns a row for each block, counted in key heads. Raises ValueError where there is none.
    """
    check_share(amount)
    blocks = [
        (path, owner, parts)
        for path, owner, parts in _found(model, ATTENTION, include, exclude)
        if _head_dim(owner) is not None
    ]
    if not blocks:
        raise ValueError("model: expected attention blocks with a head_dim, found none")
    stats = _stats(model, [parts[1] for _, _, parts in blocks], calibrate)
    rows, sizes = [], set()
    for path, owner, (inner, output) in blocks:
        size = _head_dim(owner)
        assert size is not None
        width = oriented(output).shape[1]
        heads = width // size
        groups = heads if len(inner) == 1 else oriented(inner[1]).shape[0] // size
        scores = _channel_scores(inner, output, stats.get(output), own=False)
        kept = _highest(scores.view(groups, -1).sum(1), amount)
        rows.append(Shrunk(path, groups, len(kept), tuple(kept.tolist())))
        ratio = heads // groups
        wide = _spans(kept, ratio * size)
        _keep_rows(inner[0], _repeated(wide, inner[0], width))
        for layer in inner[1:]:
            _keep_rows(layer, _spans(kept, size))
        _keep_columns(output, wide)
        _set_heads(owner, len(kept) * ratio, len(kept), size)
        sizes.add((len(kept) * ratio, len(kept), size))
    if len(sizes) == 1:
        (heads, groups, size) = next(iter(sizes))
        _update_config(model, _HEADS, {heads})
        _update_config(model, _KEY_HEADS, {groups})
        _update_config(model, ("head_dim",), {size})
    return rows


def _found(model: nn.Module, table: Any, include: Any, exclude: Any) -> list[tuple]:
    """(path, module, (first projections, last one)) of the blocks that a table names."""
    paths = paths_of(model)
    allowed = set(paths) if include is None else chosen(model, paths, "include", include)
    barred = set() if exclude is None else chosen(model, paths, "exclude", exclude)
    found = []
    taken: set[nn.Module] = set()
    for module, names in paths.items():
        if module not in allowed or module in barred:
            continue
        for row in table:
            inner, last = row if isinstance(row[0], tuple) else (row[:-1], row[-1])
            parts = [_child(module, name) for name in (*inner, last)]
            known = all(map(_plain, parts)) and not taken.intersection(parts)
            if known and _fits(parts, _FUSED.get(inner[0], 1)):
                found.append((names[0], module, (tuple(parts[:-1]), parts[-1])))
                taken.update(parts)
                break
    if not found:
        raise ValueError(
            f"model: expected blocks with projections of known names, found none in a "
            f"{type(model).__name__}"
        )
    return found


def _child(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None:
            return None
        module = found
    return module


def _plain(layer: Any) -> bool:
    """A linear layer with a float weight of its own."""
    known = isinstance(layer, nn.Linear) or (layer is not None and is_conv1d(layer))
    return known and isinstance(layer._parameters.get("weight"), nn.Parameter)


def _fits(parts: list[Any], fused: int) -> bool:
    """Whether each of `fused` projections in one has the rows that the last one has columns."""
    rows = fused * oriented(parts[-1]).shape[1]
    own = parts[:1] if len(parts) == 4 else parts[:-1]  # keys and values may be fewer
    return all(oriented(p).shape[0] == rows for p in own)


def _head_dim(owner: Any) -> int | None:
    for place in (owner, owner._modules.get("self")):
        for name in _HEAD_DIM:
            value = getattr(place, name, None)
            if isinstance(value, int):
                return value
    return None


def _stats(model: nn.Module, layers: list[Any], calibrate: Any) -> dict[nn.Module, data.Stats]:
    if calibrate is None:
        return {}
    calls, found = as_calls(calibrate, "calibrate"), {}
    for portion in data.portions(layers, [oriented(m).shape[1] for m in layers]):
        found.update(data.collect(model, portion, calls))
    return found


@torch.no_grad()
def _channel_scores(inner: Any, last: Any, stats: data.Stats | None, own: bool = True) -> Tensor:
    """[columns of the last projection]: the squared norm of what each adds to the output."""
    score = oriented(last).float().square().sum(0)
    if stats is not None:
        return score * stats.gram.diagonal()
    for layer in inner if own else ():
        norms = oriented(layer).float().square().sum(1)
        score = score * norms.view(-1, len(score)).prod(0)
    return score


def _highest(scores: Tensor, amount: float) -> Tensor:
    """The numbers of what is kept, in order; one at least."""
    count = max(1, len(scores) - round(amount * len(scores)))
    return scores.topk(count).indices.sort().values


def _spans(kept: Tensor, width: int) -> Tensor:
    """The rows of the heads that are kept."""
    return (kept.unsqueeze(1) * width + torch.arange(width, device=kept.device)).flatten()


def _repeated(kept: Tensor, layer: Any, width: int) -> Tensor:
    """The same rows of every projection of `width` that a layer holds."""
    begins = torch.arange(0, oriented(layer).shape[0], width, device=kept.device)
    return (begins.unsqueeze(1) + kept).flatten()


def _keep_rows(layer: Any, kept: Tensor) -> None:
    conv = is_conv1d(layer)
    _shrink(layer, "weight", kept, 1 if conv else 0)
    if layer.bias is not None:
        _shrink(layer, "bias", kept, 0)
    setattr(layer, "nf" if conv else "out_features", len(kept))


def _keep_columns(layer: Any, kept: Tensor) -> None:
    conv = is_conv1d(layer)
    _shrink(layer, "weight", kept, 0 if conv else 1)
    setattr(layer, "nx" if conv else "in_features", len(kept))


def _shrink(layer: Any, name: str, kept: Tensor, dim: int) -> None:
    old = layer._parameters[name]
    new = old.detach().index_select(dim, kept).contiguous()
    layer._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)


def _set_heads(owner: Any, heads: int, groups: int, size: int) -> None:
    """The numbers that attention modules keep of themselves."""
    for place in (owner, owner._modules.get("self")):
        for names, value in ((_HEADS, heads), (_KEY_HEADS, groups)):
            for name in names:
                if isinstance(getattr(place, name, None), int):
                    setattr(place, name, value)
        for name in ("all_head_size", "split_size"):
            if isinstance(getattr(place, name, None), int):
                setattr(place, name, heads * size)


def _update_config(model: Any, names: tuple[str, ...], values: set[int]) -> None:
    config = getattr(model, "config", None)
    if config is None or len(values) != 1:
        return
    for name in names:
        unset = name == "n_inner" and getattr(config, name, 0) is None  # GPT-2: four times n_embd
        if unset or isinstance(getattr(config, name, None), int):
            setattr(config, name, next(iter(values)))
