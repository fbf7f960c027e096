"""How quantized values lie in memory: kinds of codes, tables, nibbles, groups.

A tensor [R.., K] becomes codes with the same leading dimensions and one scale for each group. A
`group` is a number: n > 0 neighbours along the last dimension, 0: a row, -1: the whole tensor,
-b with b > 1: a block of b x b over the last two dimensions. The last group may be short.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("int8", "int4", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "mxfp8")
INT8, INT4, NF4, FP4, E4M3, E5M2, MXFP8 = range(7)

# NormalFloat: quantiles of a normal distribution, scaled to [-1, 1] (Dettmers et al. 2023, QLoRA)
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' fp4: a sign bit above eight magnitudes, in twelfths of the largest
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_TABLE = tuple(v / 12 for v in _FP4_TWELFTHS) + tuple(-v / 12 for v in _FP4_TWELFTHS)
TABLES = {NF4: NF4_TABLE, FP4: FP4_TABLE}

FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2, MXFP8: torch.float8_e4m3fn}
# the largest code: scales are the group's largest magnitude over it
LARGEST = {INT8: 127.0, NF4: 1.0, FP4: 1.0, E4M3: 448.0, E5M2: 57344.0, MXFP8: 448.0}


def limits(code: int) -> tuple[float, float]:
    """The least and the largest number of a symmetric kind, in units of its scale."""
    return (-8.0, 7.0) if code == INT4 else (-LARGEST[code], LARGEST[code])


SCALE_DTYPES = {INT4: torch.bfloat16, MXFP8: torch.uint8}


def packed(code: int) -> bool:
    """Whether two codes share a byte: the even element in the low nibble."""
    return code in (INT4, NF4, FP4)


def codes_dtype(code: int) -> torch.dtype:
    """The dtype that codes of this kind are stored in."""
    return torch.int8 if code == INT8 else FP8.get(code, torch.uint8)


def scales_dtype(code: int) -> torch.dtype:
    """The dtype of the scales that `quantize` makes."""
    return SCALE_DTYPES.get(code, torch.float32)


def codes_shape(shape: tuple[int, ...], code: int) -> tuple[int, ...]:
    """The shape of the codes of a tensor of this shape."""
    return (*shape[:-1], (shape[-1] + 1) // 2) if packed(code) else tuple(shape)


def scales_shape(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The shape of the scales of a tensor of this shape."""
    if group == -1:
        return (1,)
    if group == 0:
        return (*shape[:-1], 1)
    if group > 0:
        return (*shape[:-1], -(-shape[-1] // group))
    block = -group
    return (*shape[:-2], -(-shape[-2] // block), -(-shape[-1] // block))


# ---- groups


def extremes(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each group, and at least 0 in between: [scales_shape]."""
    if x.numel() == 0:
        none = x.new_zeros(scales_shape(tuple(x.shape), group))
        return none, none
    if group == -1:
        low, high = x.amin().view(1), x.amax().view(1)
    elif group == 0:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    elif group > 0:
        parts = F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
        low, high = parts.amin(-1), parts.amax(-1)
    else:
        b = -group
        parts = F.pad(x, (0, -x.shape[-1] % b, 0, -x.shape[-2] % b))
        parts = parts.unflatten(-1, (-1, b)).unflatten(-3, (-1, b))  # [.., N/b, b, K/b, b]
        low, high = parts.amin((-3, -1)), parts.amax((-3, -1))
    return low.clamp(max=0), high.clamp(min=0)


def spread(scales: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
    """Each element's scale: broadcasts to `shape`."""
    if group in (0, -1):
        return scales
    if group > 0:
        return scales.repeat_interleave(group, -1)[..., : shape[-1]]
    rows = scales.repeat_interleave(-group, -2)[..., : shape[-2], :]
    return rows.repeat_interleave(-group, -1)[..., : shape[-1]]


def gathered(x: Tensor, group: int) -> Tensor:
    """The sum of each group's elements: what `spread` does to a gradient."""
    if group == -1:
        return x.sum().view(1)
    if group == 0:
        return x.sum(-1, keepdim=True)
    if group > 0:
        return F.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group)).sum(-1)
    b = -group
    parts = F.pad(x, (0, -x.shape[-1] % b, 0, -x.shape[-2] % b))
    return parts.unflatten(-1, (-1, b)).unflatten(-3, (-1, b)).sum((-3, -1))


def gathered_parts(parts: Tensor, group: int) -> Tensor:
    """The same of [.., groups in a row], where each row's elements are summed already."""
    if group == -1:
        return parts.double().sum().float().view(1)
    if group >= 0:
        return parts
    return F.pad(parts, (0, 0, 0, -parts.shape[-2] % -group)).unflatten(-2, (-1, -group)).sum(-2)


def parts_shape(shape: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The shape of these parts for a tensor of this shape."""
    size = abs(group) if group not in (0, -1) else max(1, shape[-1])
    return (*shape[:-1], -(-shape[-1] // size))


# ---- nibbles, tables, powers of two


def pack(nibbles: Tensor, last: Tensor | int) -> Tensor:
    """[.., K] of 0 to 15 as bytes [.., ceil(K / 2)]; `last` fills the half of an odd row's end."""
    if nibbles.shape[-1] % 2:
        end = torch.zeros_like(nibbles[..., :1]) + last
        nibbles = torch.cat([nibbles, end.to(nibbles.dtype)], -1)
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def unpack(codes: Tensor, k: int) -> Tensor:
    """The first k nibbles of each row of bytes, as uint8."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., :k]


def table(code: int, like: Tensor) -> Tensor:
    """The values of the 16 codes: float32 numbers, in the dtype and on the device of `like`."""
    return torch.tensor(TABLES[code], dtype=torch.float32, device=like.device).to(like.dtype)


def thresholds(code: int) -> tuple[Tensor, Tensor]:
    """(the numbers halfway between neighbouring values, the code of each value), by size.

    In float32. A value above n of the numbers takes code n; one that is halfway, the lower value.
    """
    values = torch.tensor(TABLES[code], dtype=torch.float32)
    values, order = values.sort(stable=True)
    distinct = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] > values[:-1]])
    values, order = values[distinct], order[distinct]  # fp4 has two zeros: the first one is used
    return (values[:-1] + values[1:]) / 2, order.to(torch.uint8)


def power_exponent(top: Tensor) -> Tensor:
    """mxfp8's scale, as its e8m0 byte: the least power of two with top / 2^e <= 448.

    0 for groups of zeros (and of what is below 2^-119), 255 for what is no finite number.
    """
    fraction, exponent = torch.frexp(top)  # top = fraction * 2^exponent, fraction in [0.5, 1)
    least = exponent - 9 + (fraction > 0.875).to(exponent.dtype)  # 448 = 0.875 * 2^9
    byte = torch.where(top == 0, 0, least + 127).clamp(0, 254)
    return torch.where(top.isfinite(), byte, 255).to(torch.uint8)


def power_value(byte: Tensor, dtype: torch.dtype) -> Tensor:
    """The number that an e8m0 byte stands for; 255 is NaN."""
    value = power_of_two(byte.int() - 127)
    return torch.where(byte == 255, torch.nan, value).to(dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exactly, for -1022 to 1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def numbers(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as floats, whatever they are stored in."""
    return power_value(scales, dtype) if scales.dtype == torch.uint8 else scales.to(dtype)


def kind_code(kind: Any) -> int:
    """A kind's number; ValueError for one that does not exist."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, found {kind!r}")
    return KINDS.index(kind)
