"""QTensor: codes and scales of one tensor; quantize makes it, dequantize turns it back."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastllm.core.op import describe
from fastllm.ops import quant as ops
from fastllm.ops.quant.layout import INT8, codes_dtype
from fastllm.quant.formats import NESTED, Format, parse


def _none() -> Tensor:
    return torch.empty(0)


@dataclass(eq=False)
class QTensor:
    """A quantized tensor: a plain holder of tensors, no subclass of Tensor.

    format   what the codes are
    codes    int8 [.., K], uint8 [.., ceil(K / 2)] with element 2i in the low nibble, or float8
    scales   one a group, in format.scale_dtype; with format.double: int8 codes of them
    zeros    the zero points, as scales; empty where the format has none
    shape    of the tensor that this stands for
    dtype    that it is dequantized to
    nested   format.double only: float32 [1 + ceil(scales / 256)], the mean of the scales, then what
             each 256 of their codes are multiplied with
    """

    format: Format
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    nested: Tensor = field(default_factory=_none)

    def dequantize(self, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
        """The values as an ordinary tensor, of this dtype or `self.dtype`."""
        out = ops.dequantize(
            self.codes, self.float_scales(), self.zeros, self.format.code, self.format.group,
            self.shape[-1], dtype or self.dtype, backend=backend,
        )  # fmt: skip
        return out

    def float_scales(self) -> Tensor:
        """The scales as the ops take them: those of double quantization are decoded."""
        return unnest(self.scales, self.nested) if self.format.double else self.scales

    def to(self, *args: Any, **kwargs: Any) -> "QTensor":
        """As Tensor.to: a device moves everything; a dtype changes only what is dequantized to."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating point dtype, found {dtype}")
        moved = {
            name: getattr(self, name).to(device=device, non_blocking=non_blocking)
            for name in ("codes", "scales", "zeros", "nested")
        }
        return replace(self, dtype=dtype or self.dtype, **moved)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes + self.nested.nbytes

    @property
    def bits(self) -> float:
        """Bits a value, scales included."""
        return 8 * self.nbytes / max(1, math.prod(self.shape))

    def __getstate__(self) -> dict[str, Any]:
        """Codes as bytes: torch cannot unpickle its own float8 tensors."""
        codes = self.codes if self.codes.dtype == torch.int8 else self.codes.view(torch.uint8)
        return {**vars(self), "codes": codes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.codes = self.codes.view(codes_dtype(self.format.code))

    def __repr__(self) -> str:
        shape, dtype = list(self.shape), str(self.dtype).removeprefix("torch.")
        return f"QTensor({self.format}, {shape}, {dtype}, {self.nbytes} bytes on {self.device})"


def quantize(
    tensor: Tensor, format: str | Format = "int8", *, backend: str | None = None
) -> QTensor:
    """A tensor of any float dtype as codes of `format` (a name or a Format), rounded half to even.

    tensor [R.., K], any K, any strides; one dimension at least, two for blocks. A group of zeros
    comes back as zeros. Raises ValueError for a tensor with NaN or infinity, and for a format that
    does not exist; TypeError for what is no floating point tensor.

    >>> q = quantize(weight, "int4_g32")
    >>> q.dequantize(), q.nbytes
    """
    form = parse(format)
    made = _default(form)
    if form.scale_dtype != made.scale_dtype:
        raise ValueError(f"format: quantize makes scales of {made.scale_dtype}, found {form!r}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor: expected a Tensor, found {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"tensor: expected a floating point tensor, found {describe(tensor)}")
    codes, scales, zeros = ops.quantize(
        tensor, form.code, form.group, form.symmetric, backend=backend
    )
    check_finite(scales, tensor)
    nested = scales.new_empty(0)
    if form.double:
        scales, nested = nest(scales)
    return QTensor(form, codes, scales, zeros, tuple(tensor.shape), tensor.dtype, nested)


def _default(form: Format) -> Format:
    return replace(form, scale_dtype=None)


def check_finite(scales: Tensor, tensor: Tensor) -> None:
    """ValueError where a scale says that its group of `tensor` held NaN or infinity."""
    if scales.is_meta:
        return
    bad = scales == 255 if scales.dtype == torch.uint8 else ~scales.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"tensor: expected finite numbers, found NaN or infinity in the group {where} of "
            f"{describe(tensor)}"
        )


def dequantize(
    q: QTensor, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """The values of a QTensor, of `dtype` or the one that was quantized."""
    if not isinstance(q, QTensor):
        raise TypeError(f"q: expected a QTensor, found {type(q).__name__}")
    return q.dequantize(dtype, backend=backend)


def nest(scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as (int8 codes of their distances from the mean, `nested`)."""
    mean = scales.double().mean().float() if scales.numel() else scales.new_zeros(())
    codes, outer, _ = ops.quantize((scales - mean).flatten(), INT8, NESTED)
    return codes.view(scales.shape), torch.cat([mean.view(1), outer])


def unnest(codes: Tensor, nested: Tensor) -> Tensor:
    """`nest` undone: scales in float32, none of them negative."""
    empty = nested.new_empty(0)
    off = ops.dequantize(codes.reshape(-1), nested[1:], empty, INT8, NESTED, codes.numel())
    return (off + nested[0]).clamp(min=0).view(codes.shape)
