"""Fake quantization: tensors of any kind trained as they will be stored."""

from torch import Tensor

from fastllm.core.op import describe
from fastllm.ops import quant as ops
from fastllm.quant.formats import Format, parse
from fastllm.quant.qtensor import quantize


def fake_quantize(
    tensor: Tensor,
    format: str | Format = "int8",
    ranges: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """quantize(tensor, format).dequantize(), bit for bit, in one pass and with a gradient.

    tensor [R.., K] as `quantize` takes it; a group with NaN or infinity becomes NaN. The gradient
    passes the rounding straight through (Bengio, Léonard, Courville 2013).

    ranges: scales to use in place of the tensor's own, of the shape that `quantize` gives them, for
    symmetric formats but mxfp8. Values outside of the range move to its ends and have no gradient;
    that of the ranges is LSQ's (Esser et al. 2019) without its factor.

    Raises ValueError or TypeError naming the argument.

    >>> embedded = fake_quantize(table.weight, "int4_g32")[ids]
    """
    form = parse(format)
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating point tensor, found {describe(tensor)}")
    if form.double:  # its scales are codes themselves
        if ranges is not None:
            raise ValueError(f"ranges: expected None for {form}, found {describe(ranges)}")
        held = tensor.detach()
        return quantize(held, form, backend=backend).dequantize(backend=backend) + (tensor - held)
    return ops.fake_quantize(tensor, form.code, form.group, form.symmetric, ranges, backend=backend)
