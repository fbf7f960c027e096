"""8-bit codes and bfloat16 of optimizer states, rounded at random: as fastllm/optim/states.py says.

Tensors of the store are read and written as integers; a `key` is of a tensor in a step.
"""

import triton
import triton.language as tl

# how a state is kept, as in csrc/cpu/kernels/optim.h: float32, bfloat16, codes
SIGNED_OCTAVES, OCTAVES, FP8, FP8_SQUARE = 3, 4, 5, 6


@triton.jit
def mixed(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def _random(at, key, SIGNED: tl.constexpr):
    # 512 elements in a row share a number of their own, xor bits that depend on the place.
    group = at // 512
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    own = mixed(low * 0x9E3779B9 + mixed(high) + key)
    if not SIGNED:
        own = mixed(own)
    return own ^ mixed((at % 512).to(tl.uint32) * 0x9E3779B9)


@triton.jit
def half_from(ptr, at, mask):
    none: tl.constexpr = None if mask is None else 0
    return (tl.load(ptr + at, mask=mask, other=none).to(tl.uint32) << 16).to(
        tl.float32, bitcast=True
    )


@triton.jit
def half_to(ptr, at, mask, x, key):
    bits = x.to(tl.uint32, bitcast=True)
    up = bits + (_random(at, key, True) & 0xFFFF)
    bits = tl.where(x != x, bits | 0x400000, up)
    tl.store(ptr + at, (bits >> 16).to(tl.uint16), mask=mask)


@triton.jit
def _from_e4m3(c):
    normal = ((c << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    return tl.where(c < 8, c.to(tl.float32) * 0.001953125, normal)


@triton.jit
def _floor_e4m3(x):
    normal = (x.to(tl.uint32, bitcast=True) >> 20) - 960
    return tl.where(x < 0.015625, (x * 512.0).to(tl.uint32), normal)


@triton.jit
def load_codes(ptr, scale_ptr, at, mask, STORE: tl.constexpr):
    # the largest number that has a code
    UNIT: tl.constexpr = (
        1.875 - 2.0**-15
        if STORE == 3
        else 1.875
        if STORE == 4
        else 448.0
        if STORE == 5
        else 200704.0
    )
    none: tl.constexpr = None if mask is None else 0
    code = tl.load(ptr + at, mask=mask, other=none).to(tl.uint32)
    scale = tl.load(scale_ptr + at // 128, mask=mask, other=none).to(tl.float32)
    sign = code >> 7 << 31
    if STORE == 3:
        x = (((code & 0x7F) << 20) | 0x38000000).to(tl.float32, bitcast=True) - 3.0517578125e-05
        x = (x.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    elif STORE == 4:
        x = (((code ^ 0x80) << 20) + 0x30000000).to(tl.float32, bitcast=True)
    elif STORE == 5:
        x = _from_e4m3(code & 0x7F)
        x = (x.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    else:
        x = _from_e4m3(code)
        x = x * x
    return x * (scale * (1.0 / UNIT))


@triton.jit
def _up_or_down(low, below, above, y, random):
    share = (random & 0x7FFFFF).to(tl.float32) * 1.1920928955078125e-07
    return tl.where(share * (above - below) < y - below, low + 1, low)


@triton.jit
def store_codes(ptr, scale_ptr, at, mask, x, n, key, STORE: tl.constexpr, BLOCK: tl.constexpr):
    # `at` are BLOCK elements in a row from a multiple of 128 on, n those of the tensor.
    # the largest number that has a code
    UNIT: tl.constexpr = (
        1.875 - 2.0**-15
        if STORE == 3
        else 1.875
        if STORE == 4
        else 448.0
        if STORE == 5
        else 200704.0
    )
    bits = x.to(tl.uint32, bitcast=True)
    size = (bits & 0x7FFFFFFF).to(tl.int32)
    if mask is not None:
        size = tl.where(mask, size, 0)
    top = tl.max(tl.reshape(size, (BLOCK // 128, 128)), axis=1)
    scale = top.to(tl.float32, bitcast=True)
    # unit / scale is a number; NaN goes on
    low_bound: tl.constexpr = UNIT * 2.0**-126
    scale = tl.where(scale < low_bound, low_bound, scale)
    scale = tl.where(top < 0x00800000, 0.0, scale)
    usable = (scale > 0.0) & (top < 0x7F800000)
    # a little short of the unit: rounding never takes the largest past the last code
    short: tl.constexpr = 1.0 - 2.0**-22
    safe = tl.where(usable, scale, 1.0)
    factor = tl.div_rn(tl.zeros_like(safe) + UNIT * short, safe)
    blocks = tl.min(at, axis=0) // 128 + tl.arange(0, BLOCK // 128)
    tl.store(scale_ptr + blocks, scale, mask=blocks * 128 < n)
    whole = tl.reshape(tl.broadcast_to(factor[:, None], (BLOCK // 128, 128)), (BLOCK,))
    fine = tl.reshape(tl.broadcast_to(usable[:, None], (BLOCK // 128, 128)), (BLOCK,))
    y = tl.where(fine, tl.abs(x) * whole, 0.0)
    random = _random(at, key, STORE == 3 or STORE == 5)
    sign = bits >> 31 << 7
    if STORE == 3:
        code = (y + 3.0517578125e-05).to(tl.uint32, bitcast=True) + (random & 0xFFFFF)
        code = (code >> 20 & 0x7F) | sign
    elif STORE == 4:
        y = tl.where(y < 4.656612873077393e-10, 4.656612873077393e-10, y)
        code = y.to(tl.uint32, bitcast=True) + (random & 0xFFFFF)
        code = (code - 0x38000000) >> 20 & 0xFF
    elif STORE == 5:
        # below 2^-6 codes are evenly spaced, as floats' first three bits are from 2^-6 on
        code = tl.where(y < 0.015625, y + 0.015625, y).to(tl.uint32, bitcast=True)
        code = code + (random & 0xFFFFF) - tl.where(y < 0.015625, 0x3C800000, 0x3C000000)
        code = code.to(tl.uint32) >> 20 | sign
    else:
        low = _floor_e4m3(tl.sqrt_rn(y))
        below, above = _from_e4m3(low), _from_e4m3(low + 1)
        code = _up_or_down(low, below * below, above * above, y, random)
        # a second moment of zero would make steps endless
        code = tl.where(fine & (code == 0), 1, code)
    tl.store(ptr + at, code.to(tl.uint8), mask=mask)
