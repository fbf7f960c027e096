"""quantize and dequantize: floats to 8- and 4-bit codes with scales, and back.

fastllm.quant has these as functions of a format and a QTensor; here are the ops on plain tensors.
"""

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.ops.quant import cpu, cuda, reference, spec, stock, triton
from fastllm.ops.quant.cases import dequantize_cases, encode_cases, fake_cases, quantize_cases

quantize_op = define(
    "quantize",
    [module.BACKENDS["quantize"] for module in (cpu, triton, cuda, stock)],
    reference,
    family="quant",
    schema=spec.QUANTIZE,
    tensors=(0,),
    saved=lambda args, results: args[:1],
    saved_tensors=(0,),
    gradients={},
    outputs=3,
    check=spec.check_quantize,
    fake=spec.quantized,
    fake_backward=lambda input: (),
    cost=spec.cost_quantize,
    cases=quantize_cases(),
    values=spec.distances,
)
dequantize_op = define(
    "dequantize",
    [module.BACKENDS["dequantize"] for module in (cpu, triton, cuda, stock)],
    reference,
    family="quant",
    schema=spec.DEQUANTIZE,
    tensors=(0, 1, 2),
    saved=lambda args, results: args[:1],
    saved_tensors=(0,),
    gradients={},
    check=spec.check_dequantize,
    fake=spec.dequantized,
    fake_backward=lambda codes: (),
    cost=spec.cost_dequantize,
    cases=dequantize_cases(),
)
encode_op = define(
    "encode",
    [module.BACKENDS["encode"] for module in (cpu, triton, stock)],
    reference,
    family="quant",
    schema=spec.ENCODE,
    tensors=(0, 1),
    saved=lambda args, results: args[:1],
    saved_tensors=(0,),
    gradients={},
    outputs=2,
    check=spec.check_encode,
    fake=spec.encoded,
    fake_backward=lambda input: (),
    cost=spec.cost_encode,
    cases=encode_cases(),
    values=spec.encode_distances,
)
fake_quantize_op = define(
    "fake_quantize",
    [module.BACKENDS["fake_quantize"] for module in (cpu, triton, stock)],
    reference,
    family="quant",
    schema=spec.FAKE,
    tensors=(0, 1),
    saved_tensors=(0, 1),
    gradients={0: 0, 1: 1},
    check=spec.check_fake,
    fake=lambda input, *_: input.new_empty(input.shape),
    fake_backward=lambda input, scales, *_: (
        input.new_empty(input.shape),
        None if scales is None else scales.new_empty(scales.shape),
    ),
    cost=spec.cost_fake,
    cases=fake_cases(),
    values=spec.fake_distances,
)


def quantize(
    input: Tensor, code: int, group: int, symmetric: bool = True, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, zeros) of input [R.., K]; the layout is that of fastllm.ops.quant.layout.

    code       position in layout.KINDS
    group      n > 0: neighbours that share a scale; 0: a row; -1: the whole tensor; -b: blocks of
               b x b over the last two dimensions
    symmetric  False (int4 only): 16 codes between the smallest and the largest value, with a zero
               point a group; else zeros is empty

    Has no gradient. A group that holds NaN or infinity gets a scale that is NaN. Raises ValueError
    or TypeError for arguments that do not fit.
    """
    return quantize_op(input.detach(), code, group, symmetric, backend=backend)


def encode(
    input: Tensor, scales: Tensor, code: int, group: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(codes, scales) of input [R.., K] in ranges that are given: what is outside moves to the end.

    scales of the shape that `quantize` gives them and any floating point dtype, for symmetric kinds
    but mxfp8; they are rounded to what is stored first, and become NaN for groups that hold NaN or
    infinity. code and group as `quantize` takes them. Has no gradient: `fake_quantize` has one.
    Raises ValueError or TypeError for arguments that do not fit.
    """
    return encode_op(input.detach(), scales.detach(), code, group, backend=backend)


def range_gradients(
    grad: Tensor, input: Tensor, scales: Tensor, code: int, group: int
) -> tuple[Tensor, Tensor]:
    """What `fake_quantize` with given scales makes of a gradient: (of the input, of the scales)."""
    backward = torch.ops.fastllm.fake_quantize_backward.default
    dx, ds = backward(grad, input.detach(), scales, code, group, True, [True, True], None)
    return dx, ds


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """The values [R.., k] of `quantize`'s codes, in `dtype`; too large ones are its largest.

    scales and zeros may have any floating point dtype (mxfp8: uint8, e8m0), zeros any value.
    Has no gradient. Raises ValueError or TypeError for arguments that do not fit.
    """
    return dequantize_op(
        codes, scales.detach(), zeros.detach(), code, group, k, dtype, backend=backend
    )


def fake_quantize(
    input: Tensor,
    code: int,
    group: int,
    symmetric: bool = True,
    scales: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """dequantize(quantize(input)) in input's dtype, bit for bit, in one pass.

    code, group, symmetric as `quantize` takes them. Its gradient is the identity (Bengio, Léonard,
    Courville 2013).

    scales: those to use in place of the groups' own, of the shape that `quantize` gives them, for
    symmetric kinds but mxfp8. Then the input's gradient is 0 where it is outside of the range, and
    the scales' is that of LSQ (Esser et al. 2019), without its factor. Numbers outside of the
    range are moved to its ends; infinity and NaN become NaN.

    Raises ValueError or TypeError for arguments that do not fit.
    """
    return fake_quantize_op(input, scales, code, group, symmetric, backend=backend)
