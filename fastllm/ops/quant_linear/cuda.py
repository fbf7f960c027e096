"""quant_linear in CUDA C++ (csrc/cuda/quant.cu): a few tokens by 8- and 4-bit weights."""

from typing import Any

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.norm.cuda import _CODES, available
from fastllm.ops.quant import cuda as quant
from fastllm.ops.quant_linear import triton
from fastllm.ops.quant_linear.spec import FLOAT, Terms

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

TOKENS = 16
"""The most that the kernel takes: from there on, tiles reuse a weight that it reads again."""


def quant_linear(input: Tensor, *rest: Any) -> Tensor:
    terms = Terms(*rest)
    k, n = input.shape[-1], terms.codes.shape[0]
    x = input.reshape(-1, k).contiguous()
    out = input.new_empty((*input.shape[:-1], n))
    if not len(x):
        return out
    x = x.clone() if x.data_ptr() % 16 else x
    bias = None if terms.bias is None else terms.bias.contiguous()
    given, held = quant.weight(*terms.weight, k)
    _cuda.quant_gemv(
        _CODES[x.dtype], x.data_ptr(), len(x), k, *given, quant.address(bias), out.data_ptr(),
        *quant.place(x.device),
    )  # fmt: skip
    del held
    return out


def supports(input: Tensor, *rest: Any) -> str | None:
    """Why these arguments are not served, or None."""
    terms = Terms(*rest)
    if input.dtype not in _CODES:
        return f"{str(input.dtype).removeprefix('torch.')} input: computed by torch"
    if terms.activations != FLOAT:
        return "int8 activations: computed by Triton"
    if terms.activation is not None:
        return f"{terms.activation}: computed by Triton"
    tokens = input.numel() // max(1, input.shape[-1])
    if tokens > TOKENS:
        return f"{tokens} tokens: more than {TOKENS} are for tiles"
    return quant.misfit(terms.codes, terms.scales, terms.code, terms.group, input.shape[-1])


BACKEND: Backend = Backend("cuda", quant_linear, triton.quant_linear_backward, supports, available)
