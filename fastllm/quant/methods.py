"""The codes of one layer, by the method that a Config asks for."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastllm.quant.awq import awq
from fastllm.quant.calibrate import Stats
from fastllm.quant.config import Config
from fastllm.quant.gptq import gptq
from fastllm.quant.hqq import hqq
from fastllm.quant.qtensor import QTensor, quantize
from fastllm.quant.smooth import smooth


@dataclass(frozen=True)
class Encoded:
    """What `adopt` takes.

    input_scale [K]: what inputs are multiplied with; outliers: numbers of inputs that stay in
    float, with their columns of the weight; outlier_threshold [1]: for those of each call
    """

    q: QTensor
    activations: str
    act_scale: Tensor | None = None
    input_scale: Tensor | None = None
    outliers: Tensor | None = None
    outlier_weight: Tensor | None = None
    outlier_threshold: Tensor | None = None


def encode(weight: Tensor, config: Config, stats: Stats | None) -> Encoded:
    """weight [N, K] quantized as `config` says.

    Without stats, methods that need some round to the nearest instead, and static activations
    are dynamic: calibration did not reach this layer.
    """
    if stats is not None and config.outliers is not None:
        return _apart(weight, config, stats)
    form = config.format
    scales = None
    if stats is not None and config.smooth is not None:
        scales = smooth(weight, stats, config.smooth)
    elif stats is not None and config.method == "awq":
        scales = awq(weight, stats, lambda w: quantize(w, form).dequantize())
    scaled = weight if scales is None else (weight.float() * scales).to(weight.dtype)
    if config.method == "gptq" and stats is not None:
        gram = stats.gram if scales is None else stats.gram / scales / scales.unsqueeze(1)
        q = gptq(scaled, form, gram, config.act_order)
    elif config.method == "hqq":
        q = hqq(scaled, form)
    else:
        q = quantize(scaled, form)
    activations, act_scale = config.activations, None
    threshold = config.outlier_threshold
    above = None if threshold is None else torch.tensor([threshold], device=weight.device)
    if activations == "int8_static":
        if stats is None:
            activations = "int8"
        else:
            seen = stats if scales is None else _divided(stats, scales)
            act_scale = static_scale(seen, threshold)
    return Encoded(
        q,
        activations,
        act_scale,
        None if scales is None else 1 / scales,
        outlier_threshold=above,
    )


def _apart(weight: Tensor, config: Config, stats: Stats) -> Encoded:
    """LLM.int8: the inputs that exceed the threshold do not count for the codes."""
    assert config.outliers is not None
    loud = stats.largest > config.outliers
    keep = (~loud).to(weight.dtype)
    made = encode(
        weight * keep,
        replace(config, outliers=None),
        replace(stats, largest=torch.where(loud, 0.0, stats.largest)),
    )
    if not bool(loud.any()):
        return made
    places = loud.nonzero().flatten()
    return replace(
        made,
        input_scale=(~loud).float(),
        outliers=places,
        outlier_weight=weight[:, places].clone(),
    )


def static_scale(stats: Stats, threshold: float | None = None) -> Tensor:
    """[1]: what a whole layer's activations are divided by, so that the largest is 127.

    What exceeds `threshold` stays in float and does not count.
    """
    top = stats.largest.amax()
    top = top if threshold is None else top.clamp(max=threshold)
    return torch.where(top > 0, top / 127, 1.0).view(1)


def _divided(stats: Stats, scales: Tensor) -> Stats:
    return replace(stats, largest=stats.largest / scales)
