"""quantize and dequantize: floats to 8- and 4-bit codes with scales, and back.

fastllm.quant has these as functions of a format and a QTensor; here are the ops on plain tensors.
"""

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.ops.quant import cpu, cuda, reference, spec, stock, triton
from fastllm.ops.quant.cases import dequantize_cases, quantize_cases

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
    fake=spec.fake_quantize,
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
    fake=spec.fake_dequantize,
    fake_backward=lambda codes: (),
    cost=spec.cost_dequantize,
    cases=dequantize_cases(),
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
