"""quant_linear in CUDA C++ (csrc/cuda/quant.cu): a few tokens by 8- and 4-bit weights."""

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.cuda import _CODES, available
from fastllm.ops.quant import cuda as quant
from fastllm.ops.quant_linear import triton
from fastllm.ops.quant_linear.spec import FLOAT

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

TOKENS = 16
"""The most that the kernel takes: from there on, tiles reuse a weight that it reads again."""


def quant_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
) -> Tensor:
    k, n = input.shape[-1], codes.shape[0]
    x = input.reshape(-1, k).contiguous()
    out = input.new_empty((*input.shape[:-1], n))
    if not len(x):
        return out
    x = x.clone() if x.data_ptr() % 16 else x
    bias = None if bias is None else bias.contiguous()
    given, held = quant.weight(codes, scales, zeros, code, group, k)
    _cuda.quant_gemv(
        _CODES[x.dtype], x.data_ptr(), len(x), k, *given, quant.address(bias), out.data_ptr(),
        *quant.place(x.device),
    )  # fmt: skip
    del held
    return out


def supports(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    act_scale: Tensor | None,
    code: int,
    group: int,
    activations: int,
) -> str | None:
    """Why these arguments are not served, or None."""
    if input.dtype not in _CODES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    if activations != FLOAT:
        return "int8 activations: computed by Triton"
    tokens = input.numel() // max(1, input.shape[-1])
    if tokens > TOKENS:
        return f"{tokens} tokens: more than {TOKENS} are for tiles"
    return quant.misfit(codes, scales, code, group, input.shape[-1])


BACKEND: Backend = Backend("cuda", quant_linear, triton.quant_linear_backward, supports, available)
