"""Numbers in units of their scale to codes, one in each int32, and back.

Layout: fastllm.ops.quant.layout. Quotients are rounded as division rounds (tl.div_rn). bfloat16 is
made as the integer of its bits, float8 as bytes: no conversion that a GPU or the interpreter may
lack.
"""

import functools

import torch
import triton
import triton.language as tl


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _round(q):
    """Half to even, for |q| < 2^22: the sum has no bits left for a fraction."""
    return (q + 12582912.0) - 12582912.0


@triton.jit
def _between(x, low, high):
    """x in [low, high]; NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _bf16(x):
    """The bits of x in bfloat16, rounded half to even; NaN for NaN."""
    bits = _bits(x)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, up, 0x7FC0) & 0xFFFF


@triton.jit
def _fp8(q, x, FRACTION: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """The byte of q as a float with FRACTION bits of mantissa; the sign is that of x."""
    size = tl.minimum(tl.abs(q), LARGEST)
    bits = _bits(size)
    drop: tl.constexpr = 23 - FRACTION
    odd = (bits >> drop) & 1
    normal = (bits - ((127 - BIAS) << 23) + ((1 << (drop - 1)) - 1) + odd) >> drop
    # below the smallest normal number: multiples of its last bit, which a sum rounds to
    shift = _number(tl.zeros_like(bits) + ((151 - BIAS - FRACTION) << 23))
    small = _bits(size + shift) - _bits(shift)
    code = tl.where(bits < ((128 - BIAS) << 23), small, normal)
    return code | ((_bits(x) >> 24) & 0x80)


@triton.jit
def _codes(x, scale, zero, table_ptr, KIND: tl.constexpr, ASYM: tl.constexpr):
    """Codes of x, one in each int32. A scale that is 0 or NaN has only the code of 0."""
    good = (scale != 0) & (scale == scale)
    x = tl.where(good, x, 0.0)
    q = tl.div_rn(x, tl.where(good, scale, 1.0) + tl.zeros_like(x))
    if KIND == 0:
        code = _round(_between(q, -127.0, 127.0)).to(tl.int32) & 0xFF
    elif KIND == 1:
        if ASYM:
            q = _between(_round(_between(q, -15.0, 15.0)) + zero, 0.0, 15.0)
        else:
            q = _round(_between(q, -8.0, 7.0)) + 8.0
        code = q.to(tl.int32)
    elif KIND == 2 or KIND == 3:
        code = tl.zeros_like(_bits(q))
        for i in tl.static_range(15):
            code += (q > tl.load(table_ptr + i)).to(tl.int32)
        code = tl.load(table_ptr + 32 + code).to(tl.int32)
    elif KIND == 5:
        code = _fp8(q, x, 2, 15, 57344.0)
    else:
        code = _fp8(q, x, 3, 7, 448.0)
    return code


@triton.jit
def _values(code, zero, table_ptr, KIND: tl.constexpr):
    """What codes, one in each int32, stand for in units of their scale."""
    if KIND == 0:
        value = ((code << 24) >> 24).to(tl.float32)
    elif KIND == 1:
        value = code.to(tl.float32) - zero
    elif KIND == 2 or KIND == 3:
        value = tl.load(table_ptr + 16 + code)
    else:
        fraction: tl.constexpr = 2 if KIND == 5 else 3
        bias: tl.constexpr = 15 if KIND == 5 else 7
        size = code & 0x7F
        bits = (size << (23 - fraction)) + ((127 - bias) << 23)
        step = _number(tl.zeros_like(code) + ((128 - bias - fraction) << 23))
        value = tl.where(size < (1 << fraction), size.to(tl.float32) * step, _number(bits))
        if KIND == 5:  # the last exponent holds infinity and NaN
            value = tl.where(size == 0x7C, float("inf"), value)
        value = tl.where(size > (0x7C if KIND == 5 else 0x7E), float("nan"), value)
        value = tl.where(code > 0x7F, -value, value)
    return value


@functools.cache
def table_of(values, device):
    """float32 [48] of a table's 16 values: thresholds between them, values, codes by size."""
    if values is None:
        return None
    by_size = torch.tensor(values).sort(stable=True)
    fresh = torch.ones(16, dtype=torch.bool)
    fresh[1:] = by_size.values[1:] > by_size.values[:-1]  # fp4 has two zeros: one is used
    numbers, codes = by_size.values[fresh], by_size.indices[fresh]
    out = torch.full((48,), torch.inf)
    out[: len(numbers) - 1] = (numbers[:-1] + numbers[1:]) / 2
    out[16:32] = torch.tensor(values)
    out[32 : 32 + len(codes)] = codes.float()
    return out.to(device)
