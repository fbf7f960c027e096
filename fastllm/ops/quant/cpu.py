"""quantize and dequantize on the CPU kernels (csrc/cpu/kernels/quant.inl)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.backend import Backend
from fastllm.core.memory import empty
from fastllm.ops.quant import layout, reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALES = {**DTYPES, torch.uint8: 3}


def quantize(
    input: Tensor, code: int, group: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, shape = input.contiguous(), tuple(input.shape)
    stored = layout.codes_dtype(code)
    codes = empty(layout.codes_shape(shape, code), _bytes(stored)).view(stored)
    made = torch.empty if x.numel() else torch.zeros
    scales = made(layout.scales_shape(shape, group), dtype=layout.scales_dtype(code))
    zeros = scales.new_empty(0) if symmetric else torch.empty_like(scales)
    _C.quantize(
        DTYPES[x.dtype], code, x.data_ptr(), codes.data_ptr(), scales.data_ptr(),
        0 if symmetric else zeros.data_ptr(), *_sizes(shape), group, _height(shape),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, scales, zeros if x.numel() else zeros.zero_()


def dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    codes, scales, zeros = codes.contiguous(), scales.contiguous(), zeros.contiguous()
    shape = (*codes.shape[:-1], k)
    out = empty(shape, dtype)
    _C.dequantize(
        DTYPES[dtype], code, _SCALES[scales.dtype], codes.data_ptr(), scales.data_ptr(),
        zeros.data_ptr() if zeros.numel() else 0, out.data_ptr(), *_sizes(shape), group,
        _height(shape), torch.get_num_threads(),
    )  # fmt: skip
    return out


def encode(input: Tensor, scales: Tensor, code: int, group: int) -> tuple[Tensor, Tensor]:
    x, shape = input.contiguous(), tuple(input.shape)
    stored = layout.codes_dtype(code)
    codes = empty(layout.codes_shape(shape, code), _bytes(stored)).view(stored)
    given = scales.to(layout.scales_dtype(code)).contiguous()
    made = given.clone()
    _C.quant_encode(
        DTYPES[x.dtype], code, _SCALES[given.dtype], x.data_ptr(), codes.data_ptr(),
        made.data_ptr(), given.data_ptr(), *_sizes(shape), group, _height(shape),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, made


def fake_quantize(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> Tensor:
    x, shape = input.contiguous(), tuple(input.shape)
    out = empty(shape, x.dtype)
    if scales is None:
        made = torch.empty(layout.scales_shape(shape, group), dtype=layout.scales_dtype(code))
        zeros = made if symmetric else torch.empty_like(made)
        kind = -1
    else:
        made = zeros = scales.contiguous()
        kind = _SCALES[scales.dtype]
    _C.quant_fake(
        DTYPES[x.dtype], code, kind, x.data_ptr(), out.data_ptr(), made.data_ptr(),
        0 if symmetric else zeros.data_ptr(), *_sizes(shape), group, _height(shape),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def fake_quantize_backward(
    grad_output: Tensor, input: Tensor, scales: Tensor | None, code: int, group: int,
    symmetric: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    if scales is None:
        return grad_output, None
    x, grad, held = input.contiguous(), grad_output.contiguous(), scales.contiguous()
    shape = tuple(x.shape)
    dx, parts = empty(shape, x.dtype), torch.empty(layout.parts_shape(shape, group))
    _C.quant_fake_grad(
        DTYPES[x.dtype], code, _SCALES[held.dtype], x.data_ptr(), held.data_ptr(), grad.data_ptr(),
        dx.data_ptr(), parts.data_ptr(), *_sizes(shape), group, _height(shape),
        torch.get_num_threads(),
    )  # fmt: skip
    if not x.numel():
        return dx, torch.zeros_like(held)
    return dx, layout.gathered_parts(parts, group).to(held.dtype)


def _bytes(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.int8 else torch.uint8


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """[rows, cols]"""
    return math.prod(shape[:-1]), shape[-1]


def _height(shape: tuple[int, ...]) -> int:
    """Rows of one matrix: blocks do not reach over them."""
    return shape[-2] if len(shape) > 1 else 1


def groups_fit(code: int, group: int) -> str | None:
    """Why a kernel does not serve these groups: codes that share a byte share a scale."""
    odd = layout.packed(code) and group not in (0, -1) and group % 2
    return f"groups of {abs(group)} with two codes a byte: computed by torch" if odd else None


def _supports_quantize(input: Tensor, code: int, group: int, symmetric: bool) -> str | None:
    if not input.is_cpu:
        return f"input on {input.device}: the kernels run on the CPU"
    if input.dtype not in DTYPES:
        return f"{input.dtype} input: computed by torch"
    return groups_fit(code, group)


def _supports_dequantize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    code: int,
    group: int,
    k: int,
    dtype: torch.dtype,
) -> str | None:
    if not codes.is_cpu:
        return f"codes on {codes.device}: the kernels run on the CPU"
    if not (scales.is_cpu and zeros.is_cpu):
        return f"scales on {scales.device} with codes on {codes.device}"
    if dtype not in DTYPES or scales.dtype not in _SCALES:
        return f"{dtype} from {scales.dtype} scales: computed by torch"
    return groups_fit(code, group)


def _supports_encode(input: Tensor, scales: Tensor, code: int, group: int) -> str | None:
    return _supports_quantize(input, code, group, True)


def _supports_fake(
    input: Tensor, scales: Tensor | None, code: int, group: int, symmetric: bool
) -> str | None:
    if scales is not None and scales.dtype not in DTYPES:
        return f"{scales.dtype} scales: computed by torch"
    return _supports_quantize(input, code, group, symmetric)


BACKENDS: dict[str, Backend] = {
    "quantize": Backend("cpu", quantize, reference.quantize_backward, _supports_quantize),
    "dequantize": Backend("cpu", dequantize, reference.dequantize_backward, _supports_dequantize),
    "encode": Backend("cpu", encode, reference.encode_backward, _supports_encode),
    "fake_quantize": Backend("cpu", fake_quantize, fake_quantize_backward, _supports_fake),
}
