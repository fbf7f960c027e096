"""The contract of quantize and dequantize: schema, checks, shapes of results, costs."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.cases import Cost
from fastllm.core.op import Schema, describe
from fastllm.ops.quant import layout, reference
from fastllm.ops.quant.layout import INT4, KINDS, MXFP8

QUANTIZE = Schema(
    params="Tensor input, int code, int group, bool symmetric",
    returns="(Tensor, Tensor, Tensor)",
    backward_params="Tensor? grad_codes, Tensor? grad_scales, Tensor? grad_zeros, Tensor input",
    backward_returns="()",
)
DEQUANTIZE = Schema(
    params=(
        "Tensor codes, Tensor scales, Tensor zeros, int code, int group, SymInt k, ScalarType dtype"
    ),
    returns="Tensor",
    backward_params="Tensor? grad_output, Tensor codes",
    backward_returns="()",
)
ENCODE = Schema(
    params="Tensor input, Tensor scales, int code, int group",
    returns="(Tensor, Tensor)",
    backward_params="Tensor? grad_codes, Tensor? grad_scales, Tensor input",
    backward_returns="()",
)
FAKE = Schema(
    params="Tensor input, Tensor? scales, int code, int group, bool symmetric",
    returns="Tensor",
    backward_params=(
        "Tensor grad_output, Tensor input, Tensor? scales, int code, int group, bool symmetric"
    ),
    backward_returns="(Tensor, Tensor)",
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_kind(code: int, group: int, symmetric: bool, dims: int) -> None:
    """ValueError that names the argument, for kinds and groups that do not exist."""
    if not (isinstance(code, int) and 0 <= code < len(KINDS)):
        raise ValueError(f"code: expected 0 to {len(KINDS) - 1}, found {code!r}")
    if not symmetric and code != INT4:
        raise ValueError(f"symmetric: expected True for {KINDS[code]}, found {symmetric}")
    if code == MXFP8 and group != 32:
        raise ValueError(f"group: expected 32 for mxfp8, found {group}")
    need = 2 if group < -1 else 1
    if dims < need:
        raise ValueError(f"input: expected at least {need} dimensions for group {group}")


def check_quantize(input: Tensor, code: int, group: int, symmetric: bool) -> None:
    """Raises ValueError or TypeError that names the argument."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, found {type(input).__name__}")
    if input.dtype not in FLOATS:
        raise TypeError(f"input: expected a floating point tensor, found {describe(input)}")
    check_kind(code, group, symmetric, input.dim())


def check_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    for name, value in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, found {type(value).__name__}")
    check_kind(code, group, True, codes.dim())
    wanted = layout.codes_dtype(code)
    if codes.dtype != wanted and not (code in layout.FP8 and codes.dtype == torch.float64):
        raise TypeError(f"codes: expected {wanted} for {KINDS[code]}, found {describe(codes)}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected a floating point dtype, found {dtype}")
    width = codes.shape[-1]
    if (k + 1) // 2 != width if layout.packed(code) else k != width:
        raise ValueError(f"k: expected the values of a row of codes {describe(codes)}, found {k}")
    kinds = (torch.uint8,) if code == MXFP8 else FLOATS
    if scales.dtype not in kinds:
        raise TypeError(f"scales: expected {kinds[0]} for {KINDS[code]}, found {describe(scales)}")
    shape = layout.scales_shape((*codes.shape[:-1], k), group)
    if tuple(scales.shape) != shape:
        raise ValueError(f"scales: expected shape {list(shape)}, found {describe(scales)}")
    if zeros.numel():
        if code != INT4:
            raise ValueError(f"zeros: expected none for {KINDS[code]}, found {describe(zeros)}")
        if zeros.shape != scales.shape or zeros.dtype != scales.dtype:
            raise ValueError(f"zeros: expected {describe(scales)}, found {describe(zeros)}")


def check_encode(input: Tensor, scales: Tensor, code: int, group: int) -> None:
    """Raises ValueError or TypeError that names the argument."""
    if not isinstance(scales, Tensor):
        raise TypeError(f"scales: expected a Tensor, found {type(scales).__name__}")
    check_fake(input, scales, code, group, True)


def check_fake(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> None:
    """Raises ValueError or TypeError that names the argument."""
    check_quantize(input, code, group, symmetric)
    if scales is None:
        return
    if code == MXFP8 or not symmetric:
        kind = KINDS[code] if symmetric else "asymmetric int4"
        raise ValueError(f"scales: expected None for {kind}, found {describe(scales)}")
    if not isinstance(scales, Tensor) or scales.dtype not in FLOATS:
        raise TypeError(f"scales: expected a floating point tensor, found {describe(scales)}")
    shape = layout.scales_shape(tuple(input.shape), group)
    if tuple(scales.shape) != shape or scales.device != input.device:
        raise ValueError(
            f"scales: expected shape {list(shape)} on {input.device}, found {describe(scales)}"
        )


def quantized(
    input: Tensor, code: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales and zeros, which are empty where the format has none."""
    shape = tuple(input.shape)
    scales = input.new_empty(layout.scales_shape(shape, group), dtype=layout.scales_dtype(code))
    zeros = torch.empty_like(scales) if not symmetric else scales.new_empty(0)
    codes = input.new_empty(layout.codes_shape(shape, code), dtype=layout.codes_dtype(code))
    return codes, scales, zeros


def encoded(input: Tensor, scales: Tensor, code: int, group: int) -> tuple[Tensor, Tensor]:
    """codes, and scales as they are stored."""
    return quantized(input, code, group, True)[:2]


def dequantized(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """[R.., k] in the dtype that was asked for."""
    return codes.new_empty((*codes.shape[:-1], k), dtype=dtype)


def cost_quantize(input: Tensor, code: int, group: int, symmetric: bool) -> Cost:
    """The input is read, and codes and scales are written."""
    made = sum(t.nbytes for t in quantized(input, code, group, symmetric))
    return Cost(input.nbytes + made, 0, 4 * input.numel(), 0)


def cost_encode(input: Tensor, scales: Tensor, code: int, group: int) -> Cost:
    """The input and the scales are read, and codes are written."""
    made = sum(t.nbytes for t in encoded(input, scales, code, group))
    return Cost(input.nbytes + made, 0, 3 * input.numel(), 0)


def cost_dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, *rest: Any) -> Cost:
    """Codes and scales are read, and the output is written."""
    out = dequantized(codes, scales, zeros, *rest)
    return Cost(codes.nbytes + scales.nbytes + zeros.nbytes + out.nbytes, 0, 2 * out.numel(), 0)


def cost_fake(input: Tensor, scales: Tensor | None, *_: Any) -> Cost:
    """Read and written once; with ranges of its own a gradient is read, too."""
    held, ops = 2 * input.nbytes, 6 * input.numel()
    return Cost(held, 0, ops, 0) if scales is None else Cost(held, 3 * input.nbytes, ops, ops)


def fake_distances(args: tuple, results: tuple) -> tuple[Tensor]:
    """How far values lie from the input's (in its range), in units of the group's largest one."""
    (input, scales, code, group, _), (made,) = args, results
    x, shape = input.double(), tuple(input.shape)
    if scales is None:
        low, high = layout.extremes(x, group)
        top = torch.maximum(high, -low)
        unit = layout.spread(top, shape, group)
    else:
        each = layout.spread(scales.double(), shape, group)
        ends = [bound * each for bound in layout.limits(code)]
        x = x.clamp(torch.minimum(*ends), torch.maximum(*ends))
        unit = ends[1].abs()
    # a power of two, so that the gradients that are sent through this are rounded nowhere
    unit = layout.power_of_two(torch.frexp(unit.nan_to_num(1.0))[1].clamp(-64, 512))
    signed = (made.double() - x) / unit  # its sign is chance where two codes are as near
    return ((signed + (signed.abs() - signed).detach()).float(),)


def encode_distances(args: tuple, results: tuple) -> tuple[Tensor, ...]:
    """The same of what codes stand for, and the scales."""
    (input, _, code, group), (codes, scales) = args, results
    exact, none = scales.double(), scales.new_empty(0)
    value = reference.dequantize(codes, exact, none, code, group, input.shape[-1], torch.float64)
    return *fake_distances((input, scales, code, group, True), (value,)), exact.float()


def distances(args: tuple, results: tuple) -> tuple[Tensor, ...]:
    """What is proven of quantize in place of its codes, which are no quantities.

    How far each value lies from its code's, in units of its group's largest magnitude: the nearest
    code has the least. And the scales and zeros themselves.
    """
    (input, code, group, _), (codes, scales, zeros) = args, results
    x = input.double()
    low, high = layout.extremes(x, group)
    top = torch.maximum(high, -low)
    exact = layout.numbers(scales, torch.float64)
    k = x.shape[-1]
    value = reference.dequantize(codes, exact, zeros.double(), code, group, k, torch.float64)
    unit = layout.spread(torch.where(top == 0, 1.0, top), tuple(x.shape), group)
    return ((value - x).abs() / unit).float(), exact.float(), zeros.float()
