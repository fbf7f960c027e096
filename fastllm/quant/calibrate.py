"""What the inputs of a model's linear layers are like, from the caller's batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.run import Call, preserved

GRAMS = 1 << 30  # bytes of Gram matrices that are held at a time


@dataclass
class Stats:
    """Of the inputs [tokens, K] of one layer, in float32.

    largest  [K], the largest magnitude of each channel
    total    [K], sums of magnitudes
    gram     [K, K], X^T X: the squared error of an output with weights off by D is tr(D G D^T)
    """

    tokens: int
    largest: Tensor
    total: Tensor
    gram: Tensor

    def add(self, x: Tensor) -> None:
        """Some more inputs [tokens, K]."""
        x = x.to(self.gram.dtype)
        self.tokens += len(x)
        torch.maximum(self.largest, x.abs().amax(0), out=self.largest)
        self.total += x.abs().sum(0)
        self.gram.addmm_(x.t(), x)

    @property
    def mean(self) -> Tensor:
        """[K]: the mean magnitude of each channel."""
        return self.total / max(self.tokens, 1)


def empty(width: int, device: torch.device) -> Stats:
    """Of nothing yet."""
    zeros = torch.zeros(2, width, device=device)
    return Stats(0, zeros[0], zeros[1], torch.zeros(width, width, device=device))


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Sequence[nn.Module],
    calls: Sequence[Call],
    tick: Callable[[float], Any] | None = None,
) -> dict[nn.Module, Stats]:
    """Runs `calls` in eval mode; the stats of every layer that was reached.

    Raises ValueError where an input holds NaN or infinity. The model is as it was afterwards.
    """
    found: dict[nn.Module, Stats] = {}

    def hook(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if x is None or x.numel() == 0:
            return
        x = x.detach().reshape(-1, x.shape[-1])
        if not bool(x.isfinite().all()):
            raise ValueError("calibrate: an input of a layer holds NaN or infinity")
        if layer not in found:
            found[layer] = empty(x.shape[1], x.device)
        found[layer].add(x)

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        with preserved(model):
            for i, (args, kwargs) in enumerate(calls):
                model(*args, **kwargs)
                if tick:
                    tick((i + 1) / len(calls))
    finally:
        for handle in hooks:
            handle.remove()
    return found


def portions(
    layers: Sequence[nn.Module], widths: Sequence[int], limit: int | None = None
) -> Iterator[list[nn.Module]]:
    """The layers in order, in portions whose Gram matrices fit into `limit` bytes."""
    limit = GRAMS if limit is None else limit
    portion: list[nn.Module] = []
    held = 0
    for layer, width in zip(layers, widths, strict=True):
        need = 4 * width * width
        if portion and held + need > limit:
            yield portion
            portion, held = [], 0
        portion.append(layer)
        held += need
    if portion:
        yield portion


def sqnr(exact: Tensor, found: Tensor, gram: Tensor | None = None) -> float:
    """Signal to quantization noise in dB: of a weight [N, K], or of its outputs with `gram`."""
    signal, noise = exact.float(), (found.float() - exact.float())
    powers = [energy(signal, gram), energy(noise, gram)]
    if powers[1] <= 0:
        return float("inf")
    return 10 * torch.log10(torch.tensor(powers[0] / powers[1], dtype=torch.float64)).item()


def energy(weight: Tensor, gram: Tensor | None) -> float:
    """The sum of squares of a weight's entries, or of what it makes of the inputs of `gram`."""
    if gram is None:
        return float(weight.detach().double().square().sum())
    return float(((weight @ gram) * weight).double().sum())
