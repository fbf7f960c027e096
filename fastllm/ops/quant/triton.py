"""quantize and dequantize in Triton: fastllm.kernels.quant, imported by the first call."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.gpu import DTYPES, MAX_COLS
from fastllm.ops.norm.triton import _interpreted, available
from fastllm.ops.quant import layout, reference, spec
from fastllm.ops.quant.cpu import groups_fit

MAX_BLOCK = 128


def _kernels(name: str = "quant") -> Any:
    return importlib.import_module(f"fastllm.kernels.{name}")


def quantize(
    input: Tensor, code: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, zeros = spec.quantized(input, code, group, symmetric)
    if not input.numel():
        return codes, scales.zero_(), zeros.zero_()
    given = None if symmetric else zeros
    _kernels().quantize(
        input.contiguous(), codes, scales, given, code, group, layout.TABLES.get(code)
    )
    return codes, scales, zeros


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    out = codes.new_empty((*codes.shape[:-1], k), dtype=dtype)
    given = zeros.contiguous() if zeros.numel() else None
    _kernels().dequantize(
        codes.contiguous(), scales.contiguous(), given, out, code, group, layout.TABLES.get(code)
    )
    return out


def encode(input: Tensor, scales: Tensor, code: int, group: int) -> tuple[Tensor, Tensor]:
    codes, made = spec.encoded(input, scales, code, group)
    made.copy_(scales)
    if input.numel():
        _kernels("quant_ranges").encode_given(
            input.contiguous(), made.float(), codes, made, code, group, layout.TABLES.get(code)
        )
    return codes, made


def fake_quantize(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> Tensor:
    x, values = input.contiguous(), layout.TABLES.get(code)
    out = torch.empty_like(x)
    if scales is None:
        _, made, zeros = spec.quantized(input, code, group, symmetric)
        given = None if symmetric else zeros
        _kernels().fake_own(x, out, made, given, code, group, values)
    else:
        ends = layout.limits(code)
        _kernels("quant_ranges").fake_given(
            x, scales.contiguous(), None, out, None, code, group, values, ends
        )
    return out


def fake_quantize_backward(
    grad_output: Tensor, input: Tensor, scales: Tensor | None, code: int, group: int,
    symmetric: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if scales is None:
        return grad_output, None
    x, shape = input.contiguous(), tuple(input.shape)
    dx, parts = torch.empty_like(x), x.new_zeros(layout.parts_shape(shape, group)).float()
    _kernels("quant_ranges").fake_given(
        x, scales.contiguous(), grad_output.contiguous(), dx, parts, code, group,
        layout.TABLES.get(code), layout.limits(code),
    )  # fmt: skip
    if not x.numel():
        return dx, torch.zeros_like(scales)
    return dx, layout.gathered_parts(parts, group).to(scales.dtype)


def _place(tensor: Tensor) -> str | None:
    allowed = ("cpu",) if _interpreted() else ("cuda", "xpu")
    if tensor.device.type not in allowed:
        return f"{tensor.device.type} tensors"
    rows = math.prod(tensor.shape[:-1])
    if tensor.shape[-1] > MAX_COLS or rows >= 2**31:
        return f"{rows} rows of {tensor.shape[-1]} values"
    return None


def _supports_quantize(input: Tensor, code: int, group: int, symmetric: bool) -> str | None:
    if input.dtype not in DTYPES:
        return f"{input.dtype} input: computed by torch"
    if group < -MAX_BLOCK:
        return f"blocks of {-group}: computed by torch"
    return _place(input) or groups_fit(code, group)


def _supports_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> str | None:
    if dtype not in DTYPES or scales.dtype not in (*DTYPES, torch.uint8):
        return f"{dtype} from {scales.dtype} scales: computed by torch"
    if scales.device != codes.device or zeros.device != codes.device:
        return f"scales on {scales.device} with codes on {codes.device}"
    return _place(codes) or groups_fit(code, group)


def _supports_encode(input: Tensor, scales: Tensor, code: int, group: int) -> str | None:
    if scales.device != input.device:
        return f"scales on {scales.device} with input on {input.device}"
    return _supports_quantize(input, code, group, True)


def _supports_fake(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> str | None:
    if scales is not None and scales.dtype not in DTYPES:
        return f"{scales.dtype} scales: computed by torch"
    return _supports_quantize(input, code, group, symmetric)


BACKENDS: dict[str, Backend] = {
    "quantize": Backend(
        "triton", quantize, reference.quantize_backward, _supports_quantize, available
    ),
    "dequantize": Backend(
        "triton", dequantize, reference.dequantize_backward, _supports_dequantize, available
    ),
    "encode": Backend("triton", encode, reference.encode_backward, _supports_encode, available),
    "fake_quantize": Backend(
        "triton", fake_quantize, fake_quantize_backward, _supports_fake, available
    ),
}
