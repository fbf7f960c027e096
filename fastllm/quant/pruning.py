"""Weights set to zero, one by one or 2 of 4: magnitude, Wanda, SparseGPT.

Masks are torch.nn.utils.prune's own (`weight_orig`, `weight_mask`), so that fine-tuning keeps the
zeros, and is_pruned, remove and everything else of torch's work.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as stock

from fastllm.core.run import as_calls
from fastllm.quant import calibrate as data
from fastllm.quant import select
from fastllm.quant.select import check_share, oriented
from fastllm.quant.sparsegpt import sparsegpt

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclass
class Pruned:
    """One layer: the share of zeros, the SQNR in dB of outputs (of weights without data)."""

    path: str
    sparsity: float = 0.0
    sqnr: float | None = None
    reason: str = ""


@dataclass
class Pruning:
    """What was pruned: iterate over the rows; `sparsity` of all layers together.

    `finalize()` makes zeros permanent and takes the masks away, `restore()` brings the weights
    back as they were when they were pruned.
    """

    rows: list[Pruned] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    _before: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights of all pruned layers."""
        weights = [m.weight for m in self.modules.values()]
        total = sum(w.numel() for w in weights)  # type: ignore[misc, operator]
        return sum(int((w == 0).sum()) for w in weights) / max(total, 1)  # type: ignore

    def finalize(self) -> None:
        """Zeros become part of the weights; masks and hooks go."""
        for module in self.modules.values():
            if stock.is_pruned(module):
                _unmask(module)
        self._before.clear()

    def restore(self) -> None:
        """The weights as they were before; RuntimeError after `finalize()`."""
        if self.modules and not self._before:
            raise RuntimeError("restore: the masks are permanent, the originals are gone")
        for path, module in self.modules.items():
            _unmask(module)
            with torch.no_grad():
                module.weight.copy_(self._before[path])  # type: ignore[operator, union-attr]
        self.modules.clear()
        self._before.clear()

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        done = f"pruned {len(self.modules)} layers to {self.sparsity:.1%} zeros"
        lines = [done]
        for row in self.rows:
            found = row.reason or f"{row.sparsity:.1%} zeros"
            lines.append(f"{row.path}: {found}" + (f", {row.sqnr:.1f} dB" if row.sqnr else ""))
        return "\n".join(lines)


def prune(
    model: nn.Module,
    amount: float = 0.5,
    method: str = "magnitude",
    pattern: tuple[int, int] | None = None,
    include: Any = None,
    exclude: Any = None,
    calibrate: Any = None,
) -> Pruning:
    """Sets a share of the weights of every linear layer to zero, in place, with masks.

    amount    the share, in [0, 1); with a pattern, it is the pattern's
    method    "magnitude": the smallest of the layer. "wanda": the smallest of |weight| * |input|
              of each row (Sun et al. 2023). "sparsegpt": as the inverse Hessian says, and the
              others make up for it (Frantar and Alistarh 2023). The latter two take `calibrate`
    pattern   (2, 4): two zeros in every four neighbours along a row; any (zeros, of)
    include, exclude, calibrate  as fastllm.quantize takes them

    The output layer of a language model is left alone unless `include` is given and matches it.
    Returns a Pruning. Raises TypeError or ValueError naming the argument; the model is then as it
    was.
    """
    calls = None if calibrate is None else as_calls(calibrate, "calibrate")
    _check(amount, method, pattern, calls)
    known, found = select.candidates(model, include, exclude)
    made, layers = Pruning(), {}
    for module, path in found:
        row = Pruned(path)
        made.rows.append(row)
        row.reason = select.why_not(module, known, include is not None) or ""
        width = oriented(module).shape[1] if not row.reason else 0
        if pattern and width % pattern[1]:
            row.reason = f"its width {width} is no multiple of {pattern[1]}"
        if not row.reason:
            layers[module] = row
    portions: Any = [list(layers)]
    if calls is not None:
        portions = data.portions(list(layers), [oriented(m).shape[1] for m in layers])
    try:
        for portion in portions:
            stats = {} if calls is None else data.collect(model, portion, calls)
            for module in portion:
                _one(made, module, layers[module], amount, method, pattern, stats.get(module))
    except BaseException:
        made.restore()
        raise
    return made


def _check(amount: float, method: str, pattern: Any, calls: Any) -> None:
    check_share(amount)
    if method not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise ValueError(f"method: expected one of {names}, found {method!r}")
    if pattern is not None and not _is_pattern(pattern):
        raise ValueError(f"pattern: expected (zeros, of) with zeros < of, found {pattern!r}")
    if method != "magnitude" and calls is None:
        raise ValueError(f"calibrate: expected batches for {method!r}, found None")


def _is_pattern(wish: Any) -> bool:
    whole = isinstance(wish, tuple | list) and [type(n) for n in wish] == [int, int]
    return whole and 0 < wish[0] < wish[1]


@torch.no_grad()
def _one(
    made: Pruning, module: Any, row: Pruned, amount: float, method: str,
    pattern: tuple[int, int] | None, stats: data.Stats | None,
) -> None:  # fmt: skip
    weight = oriented(module)
    before = weight.detach().float().clone()
    kept = module.weight.detach().clone()
    gram = None if stats is None else stats.gram
    if method == "sparsegpt" and gram is not None:
        new, mask = sparsegpt(before, gram, amount, pattern)
        weight.copy_(new)
    else:
        score = before.abs()
        by_row = method == "wanda" and gram is not None
        if by_row and gram is not None:
            score = score * gram.diagonal().sqrt()
        mask = pattern_mask(score, pattern) if pattern else share_mask(score, amount, by_row)
    made._before[row.path] = kept
    made.modules[row.path] = module
    mask = mask.to(weight.dtype)
    stock.custom_from_mask(module, "weight", mask if weight is module.weight else mask.t())
    row.sparsity = 1 - float(mask.mean())
    row.sqnr = data.sqnr(before, oriented(module), gram)


def _unmask(module: nn.Module) -> None:
    """torch's remove, with the parameters in the order that they had."""
    stock.remove(module, "weight")
    module._parameters |= {n: module._parameters.pop(n) for n in ("weight", "bias")}


def share_mask(score: Tensor, amount: float, by_row: bool) -> Tensor:
    """True for all but the lowest `amount` of a matrix, or of each of its rows."""
    flat = score if by_row else score.reshape(1, -1)
    count = round(amount * flat.shape[1])
    mask = torch.ones_like(flat, dtype=torch.bool)
    lowest = flat.topk(count, dim=1, largest=False).indices
    return mask.scatter_(1, lowest, False).view(score.shape)


def pattern_mask(score: Tensor, pattern: tuple[int, int]) -> Tensor:
    """False for the lowest `zeros` of every `of` neighbours along a row."""
    zeros, of = pattern
    parts = score.unflatten(-1, (-1, of))
    mask = torch.ones_like(parts, dtype=torch.bool)
    lowest = parts.topk(zeros, dim=-1, largest=False).indices
    return mask.scatter_(-1, lowest, False).flatten(-2)
