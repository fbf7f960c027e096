"""How optimizer states are kept: float32, bfloat16, or 8-bit codes with a scale for 128 elements.

A code stands for value(code) * scale, where scale is the largest magnitude among its 128 elements:

    int8   first moment  c |c| / 127^2, signed;    second moment  (c / 255)^4
    fp8    first moment  e4m3(c) / 448, signed;    second moment  (e4m3(c) / 448)^2

The roots give small values their share of the codes. Codes, and bfloat16, are rounded up or down at
random in proportion to the distances: a moving average that moves by less than half a code in each
step would otherwise never move. The random bits come from a counter (element, tensor, step, seed),
so that a step is repeatable. A second moment's code is above zero wherever its scale is.

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

_MASK, _GOLDEN = 0xFFFFFFFF, 0x9E3779B9


@dataclass(frozen=True)
class Code:
    """One 8-bit code of numbers in units of scale / unit.

    value() of codes counted from zero, rising; low(), the code at or next below.
    """

    dtype: torch.dtype
    most: int
    unit: float
    signed: bool
    value: Callable[[Tensor], Tensor]
    low: Callable[[Tensor], Tensor]


def _e4m3(codes: Tensor) -> Tensor:
    c = codes.to(torch.int32)
    normal = ((c << 20) + 0x3C000000).view(torch.float32)
    return torch.where(c < 8, c.float() * 2.0**-9, normal)


def _floor_e4m3(x: Tensor) -> Tensor:
    normal = (x.view(torch.int32) >> 20) - (120 << 3)
    return torch.where(x < 2.0**-6, (x * 2.0**9).int(), normal)


_FP8 = torch.float8_e4m3fn
CODES = {
    ("int8", 0): Code(
        torch.int8, 127, 127.0**2, True, lambda c: c.float() ** 2, lambda y: y.sqrt().int()
    ),
    ("int8", 1): Code(
        torch.uint8,
        255,
        255.0**4,
        False,
        lambda c: (c.float() ** 2) ** 2,
        lambda y: y.sqrt().sqrt().int(),
    ),
    ("fp8", 0): Code(_FP8, 126, 448.0, True, _e4m3, _floor_e4m3),
    ("fp8", 1): Code(
        _FP8, 126, 448.0**2, False, lambda c: _e4m3(c) ** 2, lambda y: _floor_e4m3(y.sqrt())
    ),
}


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
    return mixed((mixed((seed + _GOLDEN * number) & _MASK) + time) & _MASK)


def random_bits(key: int, elements: int, device: torch.device, signed: bool = True) -> Tensor:
    """23 random bits (as int64) for each of the elements of a tensor.

    DEALT elements in a row share a number of their own, xor bits that depend on the place; signed
    and unsigned codes have different ones.
    """
    group = torch.arange(-(-elements // DEALT), device=device)
    base = _mixed((group & _MASK) * _GOLDEN + _mixed(group >> 32) + key)
    deal = _mixed(torch.arange(DEALT, device=device) * _GOLDEN)
    bits = (base if signed else _mixed(base))[:, None] ^ deal
    return (bits & 0x7FFFFF).flatten()[:elements]


def _mixed(x: Tensor) -> Tensor:
    """mixed() of many numbers."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def decode(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """float32 values [n] of flat codes [n]."""
    raw = codes.view(torch.uint8).int()
    size = raw
    if code.signed and code.dtype == torch.int8:
        size = torch.where(raw > 127, 256 - raw, raw)
    elif code.signed:
        size = raw & 127
    units = scales.float() * (1.0 / code.unit)
    value = code.value(size) * units.repeat_interleave(BLOCK)[: raw.numel()]
    return torch.where(raw > 127, -value, value) if code.signed else value


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
    y = y.flatten()[:n]
    low = code.low(y)
    below, above = code.value(low), code.value(low + 1)
    if key:
        share = random_bits(key, n, x.device, code.signed).float() * 2.0**-23
    else:
        share = torch.full_like(y, 0.5)
    made = (low + (share * (above - below) < y - below).int()).clamp(max=code.most)
    if not code.signed:
        made = made.maximum(usable.repeat_interleave(BLOCK)[:n])
    elif code.dtype == torch.int8:
        made = torch.where(x.signbit(), -made, made) & 255
    else:
        made = torch.where(x.signbit(), made | 128, made)
    return made.to(torch.uint8).view(code.dtype), scales


def round_bf16(x: Tensor, key: int) -> Tensor:
    """float32 [n] in bfloat16, up or down at random."""
    bits = x.view(torch.int32).long() & _MASK
    up = (bits + (random_bits(key, x.numel(), x.device) & 0xFFFF)) & 0xFFFF0000
    up = torch.where(up >= 1 << 31, up - (1 << 32), up).int().view(torch.float32)
    return torch.where(x.isnan(), x, up).to(torch.bfloat16)
