"""quantize and dequantize in plain torch: any float dtype; in float64 the oracle.

Codes are computed against the scale as it is stored, and rounded half to even. A group that holds
NaN or infinity gets the scale NaN: its values come back as NaN, never as numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.ops.quant import layout
from fastllm.ops.quant.layout import E4M3, E5M2, INT4, INT8, MXFP8


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def quantize(
    input: Tensor, code: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros)"""
    x = _wide(input)
    low, high = layout.extremes(x, group)
    scales, zeros = _scales(low, high, code, symmetric)
    each = layout.spread(layout.numbers(scales, x.dtype), tuple(x.shape), group)
    ratio = torch.where(each == 0, 0.0, x / torch.where(each == 0, 1.0, each)).nan_to_num(0.0)
    shift: Tensor | int = 8
    if not symmetric:
        shift = layout.spread(zeros, tuple(x.shape), group).expand_as(x).nan_to_num(0.0)
    return _codes(ratio, code, shift), scales, zeros


def encode(input: Tensor, scales: Tensor, code: int, group: int) -> tuple[Tensor, Tensor]:
    """(codes, scales as they are stored): those of groups with NaN or infinity are NaN."""
    low, high = layout.extremes(_wide(input), group)
    good = low.isfinite() & high.isfinite()
    stored = scales.to(layout.scales_dtype(code))
    units, _ = _units(input, stored, group)
    return _codes(units.nan_to_num(0.0), code, 8), torch.where(good, stored, torch.nan)


def _scales(low: Tensor, high: Tensor, code: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zeros as they are stored, from the extremes of the groups."""
    top = torch.maximum(high, -low)
    good, none = top.isfinite(), low.new_empty(0, dtype=layout.scales_dtype(code))
    if code == MXFP8:
        return layout.power_exponent(top), none
    if code != INT4:
        scales = (top / layout.LARGEST[code]).float()
        return torch.where(good & scales.isfinite(), scales, torch.nan), none
    if symmetric:  # the largest magnitude is code -8, whatever its sign: no code is left unused
        scales = torch.where(high >= -low, high, low) / -8
        return torch.where(good, scales, torch.nan).bfloat16(), none
    scales = (high / 15 - low / 15).bfloat16()
    whole = scales.to(low.dtype)
    zeros = torch.where(whole == 0, 0.0, -low / torch.where(whole == 0, 1.0, whole))
    zeros = (zeros.round().clamp(0, 15) + 0.0).bfloat16()  # no -0
    return torch.where(good, scales, torch.nan), torch.where(good, zeros, 0.0)


def _codes(ratio: Tensor, code: int, shift: Tensor | int) -> Tensor:
    """Codes of numbers in units of the scale."""
    if code == INT8:
        return ratio.round().clamp(-127, 127).to(torch.int8)
    if code == INT4:
        nibbles = (ratio.round() + shift).clamp(0, 15).to(torch.uint8)
        return layout.pack(nibbles, shift[..., -1:] if isinstance(shift, Tensor) else shift)
    if code in (E4M3, E5M2, MXFP8):
        largest = layout.LARGEST[code]
        # float8 is reached from float32: a float64's first rounding has to be the only one
        return _once(ratio.clamp(-largest, largest), code).to(layout.FP8[code])
    bounds, order = layout.thresholds(code)
    place = torch.bucketize(ratio, bounds.to(ratio))
    end = int(order[torch.bucketize(0.0, bounds)])
    return layout.pack(order.to(ratio.device)[place], end)


def _once(value: Tensor, code: int) -> Tensor:
    """A float64 on the grid of the float8, so that float32 in between changes nothing."""
    if value.dtype != torch.float64:
        return value
    bits, least = (3, -6) if code != E5M2 else (2, -14)
    exponent = torch.frexp(value)[1].clamp(min=least + 1) - 1 - bits
    step = layout.power_of_two(exponent)
    return (value / step).round() * step


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """code * scale, rounded once; no further from 0 than the largest number of `dtype`."""
    oracle = torch.float64 in (codes.dtype, scales.dtype, dtype)
    wide = torch.float64 if oracle else torch.float32
    values = (layout.unpack(codes, k) if layout.packed(code) else codes).to(wide)
    if code in layout.TABLES:
        values = layout.table(code, values)[values.long()]
    shape = tuple(values.shape)
    if code == INT4:
        values = values - (layout.spread(zeros.to(wide), shape, group) if zeros.numel() else 8)
    out = values * layout.spread(layout.numbers(scales, wide), shape, group)
    largest = torch.finfo(dtype).max
    return out.clamp(-largest, largest).to(wide if oracle else dtype)


def fake_quantize(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> Tensor:
    """What the codes of input stand for; its gradients pass the rounding straight through."""
    if scales is None:
        held, k = input.detach(), input.shape[-1]
        codes = quantize(held, code, group, symmetric)
        return dequantize(*codes, code, group, k, input.dtype) + (input - held)
    units, each = _units(input, scales, group)
    inside = units.clamp(*layout.limits(code))
    numbers = _numbers(inside.detach(), code)
    smooth = torch.where(each == 0, input, (inside + (numbers - inside.detach())) * each)
    largest = torch.finfo(input.dtype).max
    made = (numbers * each.detach()).clamp(-largest, largest).to(input.dtype)
    made = torch.where(input.isfinite(), made, torch.nan)
    return made + (smooth - smooth.detach()).to(input.dtype)


def _units(input: Tensor, scales: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The input in units of its scales, and each element's scale."""
    x = _wide(input)
    each = layout.spread(scales.to(x.dtype), tuple(x.shape), group).expand_as(x)
    return torch.where(each == 0, 0.0, x / torch.where(each == 0, 1.0, each)), each


def _numbers(units: Tensor, code: int) -> Tensor:
    """The nearest numbers of a symmetric kind."""
    codes, none = _codes(units.nan_to_num(0.0), code, 8), units.new_empty(0)
    return dequantize(codes, units.new_ones(1), none, code, -1, units.shape[-1], units.dtype)


def fake_quantize_backward(
    grad_output: Tensor, input: Tensor, scales: Tensor | None, code: int, group: int,
    symmetric: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """LSQ: the input's gradient stops outside of the range; the scale's is what rounding did."""
    if scales is None:
        return grad_output, None
    units, _ = _units(input, scales, group)
    low, high = layout.limits(code)
    below, above = units < low, units > high
    dx, ds = torch.where(below | above, 0.0, grad_output), None
    if needs[1]:
        exact, _ = _units(input.double(), scales, group)
        rest = _numbers(units, code) - exact
        slope = torch.where(below, low, torch.where(above, high, rest))
        ds = layout.gathered(grad_output * slope, group).to(scales.dtype)
    return dx, ds


def quantize_backward(*_: object) -> None:
    """There is none: codes are integers."""
    raise RuntimeError("quantize has no gradient: fastllm.quant has fake quantization for training")


def encode_backward(*_: object) -> None:
    """There is none: codes are integers."""
    raise RuntimeError("encode has no gradient: fake_quantize with scales has that of ranges")


def dequantize_backward(*_: object) -> None:
    """There is none: codes are integers."""
    raise RuntimeError("dequantize has no gradient")
