"""How optimizer states are kept: float32, bfloat16, or 8-bit codes with a scale for 128 elements.

A code stands for value(code) * scale, where scale is the largest magnitude among its 128 elements:

    int8   first moment  sign and octaves(c) - 2^-15;  second moment  octaves(c), no zero
    fp8    first moment  e4m3(c), signed;              second moment  e4m3(c)^2

each over the largest value there is. octaves(c) are floats with three bits of fraction: eight even
steps to each power of two, 16 powers of two for the first moment and 32 for the second. With the
2^-15, which makes zero a code, that is the companding of telephony (ITU-T G.711, mu-law): small
values keep their share of the codes, and adding random bits to a float's own is all the rounding.

Codes, and bfloat16, are rounded up or down at random in proportion to the distances: a moving
average that moves by less than half a code in each step would otherwise never move. As many random
bits are drawn as are dropped (16 for bfloat16, 20 for codes), which leaves no bias; fp8's second
moment has 23, a bias of at most 2^-24 of a code. They come from a counter (element, tensor, step,
seed), so that a step is repeatable. A second moment's code is above zero wherever its scale is.

Until version 2, int8 codes were c |c| / 127^2 in int8 and (c / 255)^4 in uint8; the dtypes
tell, and load_state_dict converts them.

This module is the plain torch form; the kernels do the same.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm.optim.local import is_dtensor, scales_like_shard, zeros_like_shard

BLOCK = 128  # elements that share a scale
SMALL = 4096  # tensors of fewer elements keep float32 states
STATE_DTYPES = ("fp32", "bf16", "int8", "fp8")
LOW = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *LOW)

DEALT = 4 * BLOCK  # elements that share a random number

_MASK, GOLDEN = 0xFFFFFFFF, 0x9E3779B9


@dataclass(frozen=True)
class Code:
    """One 8-bit code of numbers in units of scale / unit.

    value() of codes counted from zero, rising; low(), the code at or next below. bits(), where
    there are such: what has the code from its bit 20 on, and below the share of the way to the
    next. A stored byte is the code xor `flip`; bit 7 is the sign of signed ones.
    """

    dtype: torch.dtype
    most: int
    unit: float
    signed: bool
    value: Callable[[Tensor], Tensor]
    low: Callable[[Tensor], Tensor]
    bits: Callable[[Tensor], Tensor] | None = None
    flip: int = 0


def _e4m3(codes: Tensor) -> Tensor:
    c = codes.to(torch.int32)
    normal = ((c << 20) + 0x3C000000).view(torch.float32)
    return torch.where(c < 8, c.float() * 2.0**-9, normal)


def _floor_e4m3(x: Tensor) -> Tensor:
    normal = (x.view(torch.int32) >> 20) - (120 << 3)
    return torch.where(x < 2.0**-6, (x * 2.0**9).int(), normal)


def _bits_e4m3(y: Tensor) -> Tensor:
    # below 2^-6 codes are evenly spaced, as floats' first three bits are from 2^-6 on
    even = y < 2.0**-6
    bits = torch.where(even, y + 2.0**-6, y).view(torch.int32)
    return bits - torch.where(even, 0x3C800000, 0x3C000000).to(torch.int32)


def _octaves(count: int, offset: float, signed: bool) -> Code:
    """`count` powers of two, the last from 1 to 2, less an offset."""
    base = (128 - count) << 23

    def bits(y: Tensor) -> Tensor:
        return (y + offset).clamp(min=2.0 ** (1 - count)).view(torch.int32) - base

    return Code(
        torch.uint8 if signed else torch.int8, 8 * count - 1, 1.875 - offset, signed,
        lambda c: ((c.to(torch.int32) << 20) + base).view(torch.float32) - offset,
        lambda y: bits(y) >> 20, bits, 0 if signed else 128,
    )  # fmt: skip


_FP8 = torch.float8_e4m3fn
CODES = {
    ("int8", 0): _octaves(16, 2.0**-15, True),
    ("int8", 1): _octaves(32, 0.0, False),
    ("fp8", 0): Code(_FP8, 126, 448.0, True, _e4m3, _floor_e4m3, _bits_e4m3),
    ("fp8", 1): Code(
        _FP8, 126, 448.0**2, False, lambda c: _e4m3(c) ** 2, lambda y: _floor_e4m3(y.sqrt())
    ),
}


def _first_int8(codes: Tensor, units: Tensor) -> Tensor:
    c = codes.float()
    return c * c.abs() / 127.0**2 * units


def _first_uint8(codes: Tensor, units: Tensor) -> Tensor:
    return (codes.float() / 255.0) ** 4 * units


OLD = {(torch.int8, 0): _first_int8, (torch.uint8, 1): _first_uint8}  # by dtype and place


def scales_of(elements: int) -> int:
    """How many scales that many elements have."""
    return -(-elements // BLOCK)


def format_of(param: Tensor, state_dtype: str) -> str:
    """What the states of `param` are kept as: one of STATE_DTYPES, or "own", its own dtype."""
    if param.dtype not in KERNEL_DTYPES:
        return "own"
    return "fp32" if state_dtype in ("int8", "fp8") and param.numel() < SMALL else state_dtype


def code_of(kept: str, place: int) -> Code | None:
    """The code of a tensor's state number `place`; None: it is kept as plain numbers."""
    return CODES.get((kept, place))


def zeros(param: Tensor, kept: str, place: int) -> tuple[Tensor, Tensor | None]:
    """A state of zeros in the memory order of `param`, and its scales if it has any."""
    code = code_of(kept, place)
    if code is None:
        dtype = {"own": param.dtype, "bf16": torch.bfloat16}.get(kept, torch.float32)
        if place > 1 and kept == "bf16":
            dtype = torch.float32
        return torch.zeros_like(param, dtype=dtype), None
    if is_dtensor(param):
        return zeros_like_shard(param, code.dtype), scales_like_shard(param, scales_of)
    codes = torch.zeros_like(param, dtype=torch.uint8).view(code.dtype)
    scales = torch.zeros(scales_of(param.numel()), device=param.device)
    return codes, scales


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order, without a copy."""
    return tensor.as_strided((tensor.numel(),), (1,))


def mixed(x: int) -> int:
    """A 32-bit hash."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK
    return x ^ (x >> 15)


def key_of(seed: int, number: int, time: int) -> int:
    """The key of a tensor's random numbers in a step."""
    return mixed((mixed_key(seed, number) + time) & _MASK)


def mixed_key(seed: int, number: int) -> int:
    """The part of a key that steps do not change."""
    return mixed((seed + GOLDEN * number) & _MASK)


def random_bits(key: int, elements: int, device: torch.device, signed: bool = True) -> Tensor:
    """23 random bits (as int64) for each of the elements of a tensor.

    DEALT elements in a row share a number of their own, xor bits that depend on the place; signed
    and unsigned codes have different ones.
    """
    group = torch.arange(-(-elements // DEALT), device=device)
    base = mixed_all((group & _MASK) * GOLDEN + mixed_all(group >> 32) + key)
    deal = mixed_all(torch.arange(DEALT, device=device) * GOLDEN)
    bits = (base if signed else mixed_all(base))[:, None] ^ deal
    return (bits & 0x7FFFFF).flatten()[:elements]


def mixed_all(x: Tensor) -> Tensor:
    """mixed() of many numbers."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """float32 values [n] of flat codes [n]."""
    raw = codes.view(torch.uint8).int()
    size = raw & 127 if code.signed else raw ^ code.flip
    value = code.value(size) * _spread(scales.float() * (1.0 / code.unit), raw.numel())
    return torch.where(raw > 127, -value, value) if code.signed else value


def decode_saved(codes: Tensor, scales: Tensor, place: int) -> Tensor:
    """The same of any codes that a checkpoint may have for a tensor's state number `place`."""
    if (codes.dtype, place) in OLD:
        return OLD[codes.dtype, place](codes, _spread(scales.float(), codes.numel()))
    for code in CODES.values():
        if code.dtype == codes.dtype and code.signed == (place == 0):
            return decode(codes, scales, code)
    raise ValueError(f"state {place}: expected 8-bit codes, found {codes.dtype}")


def _spread(scales: Tensor, n: int) -> Tensor:
    """Each element's scale."""
    return scales.repeat_interleave(BLOCK)[:n]


def encode(x: Tensor, code: Code, key: int) -> tuple[Tensor, Tensor]:
    """(codes [n], scales) of float32 values [n]; `key` 0 rounds to the nearest code."""
    n = x.numel()
    padded = torch.nn.functional.pad(x, (0, scales_of(n) * BLOCK - n)).view(-1, BLOCK)
    scales = padded.abs().amax(1) if n else padded.new_zeros(0)
    scales = torch.where(padded.isnan().any(1), torch.nan, scales) if n else scales
    least = code.unit * 2.0**-126  # unit / scale is a number
    scales = torch.where(scales < 2.0**-126, 0.0, scales.clamp(min=least))
    usable = scales.isfinite() & (scales > 0)
    # a little short of the unit: rounding never takes the largest past the last code
    factor = torch.where(usable, code.unit * (1 - 2.0**-22) / scales, 0.0)
    y = torch.where(usable[:, None], padded.abs() * factor[:, None], 0.0)
    made = _rounded(y.flatten()[:n], code, key).clamp(max=code.most)
    if code.signed:
        made = torch.where(x.signbit(), made | 128, made)
    elif code.bits is None:
        made = made.maximum(usable.repeat_interleave(BLOCK)[:n])
    return (made ^ code.flip).to(torch.uint8).view(code.dtype), scales


def _rounded(y: Tensor, code: Code, key: int) -> Tensor:
    """The codes of numbers, up or down at random."""
    random = random_bits(key, y.numel(), y.device, code.signed) if key else None
    if code.bits is not None:
        more = 1 << 19 if random is None else (random & 0xFFFFF).int()
        return (code.bits(y) + more) >> 20
    low = code.low(y)
    below, above = code.value(low), code.value(low + 1)
    share = torch.full_like(y, 0.5) if random is None else random.float() * 2.0**-23
    return low + (share * (above - below) < y - below).int()


def round_bf16(x: Tensor, key: int) -> Tensor:
    """float32 [n] in bfloat16, up or down at random."""
    bits = x.view(torch.int32).long() & _MASK
    up = (bits + (random_bits(key, x.numel(), x.device) & 0xFFFF)) & 0xFFFF0000
    up = torch.where(up >= 1 << 31, up - (1 << 32), up).int().view(torch.float32)
    return torch.where(x.isnan(), x, up).to(torch.bfloat16)
