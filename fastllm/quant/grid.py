"""The numbers that a format's codes stand for, in units of the scale; and codes for them."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import quant as ops
from fastllm.ops.quant import layout
from fastllm.quant.formats import Format
from fastllm.quant.qtensor import QTensor, check_finite

Zero = Tensor | int


def snap(units: Tensor, format: Format, zero: Zero = 8) -> Tensor:
    """The nearest of the format's numbers. `zero` is int4's zero point, whole or not."""
    if format.kind == "int4":
        return (units + zero).round().clamp(0, 15) - zero
    if format.kind == "int8":
        return units.round().clamp(-127, 127)
    if format.packed:
        bounds, order = layout.thresholds(format.code)
        values = layout.table(format.code, units)
        return values[order.to(units.device)[torch.bucketize(units, bounds.to(units))].long()]
    return units.clamp(*layout.limits(format.code)).to(layout.FP8[format.code]).to(units.dtype)


def codes_of(numbers: Tensor, format: Format, zero: Zero = 8) -> Tensor:
    """The codes [.., K] of numbers that `snap` made, packed."""
    if format.kind == "int8":
        return numbers.to(torch.int8)
    if format.kind == "int4":
        nibbles = (numbers + zero).round().clamp(0, 15).to(torch.uint8)
        last = zero.round().clamp(0, 15)[..., -1:] if isinstance(zero, Tensor) else zero
        return layout.pack(nibbles, last)
    if format.packed:
        bounds, order = layout.thresholds(format.code)
        place = torch.bucketize(numbers, bounds.to(numbers))
        end = int(order[torch.bucketize(0.0, bounds)])
        return layout.pack(order.to(numbers.device)[place], end)
    return numbers.to(layout.FP8[format.code])


def scales_of(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """(scales, zeros) as rounding to the nearest has them; ValueError for NaN and infinity."""
    _, scales, zeros = ops.quantize(weight, format.code, format.group, format.symmetric)
    check_finite(scales, weight)
    return scales, zeros


def encoded(weight: Tensor, format: Format, scales: Tensor, zeros: Tensor) -> QTensor:
    """The nearest codes for these scales and zeros, which may be any."""
    shape = tuple(weight.shape)
    each = layout.spread(layout.numbers(scales, torch.float32), shape, format.group)
    zero: Zero = 8
    if zeros.numel():
        zero = layout.spread(zeros.float(), shape, format.group).expand(shape)
    units = torch.where(each == 0, 0.0, weight.float() / torch.where(each == 0, 1.0, each))
    codes = codes_of(snap(units, format, zero), format, zero)
    return QTensor(format, codes, scales, zeros, shape, weight.dtype)


def by_groups(x: Tensor, group: int) -> Tensor:
    """[N, K] as [N, groups, group]; a short last group is filled with zeros."""
    return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def by_row(format: Format) -> Format:
    """The format with one scale a row: what a group's columns are, on their own."""
    return format if format.kind == "mxfp8" else replace(format, group=0, double=False)
