"""One product, act(a b^T + bias) + residual, on one of three CPU libraries, and the choice of one.

linear's Y, dX and dW are each such a product: a [M, K] and b [N, K] may be transposed views, which
every one of the three reads as they lie.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.core.memory import empty
from fastllm.core.tuner.tunable import Tunable
from fastllm.ops.matmul import packed
from fastllm.ops.matmul.reference import activate

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATION_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "relu": 4, "relu2": 5}
THIN_ROWS = 4  # gemm.h's kThinRows

Product = Callable[..., Tensor]


def cpu(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    pre: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    block: int | None = None,
) -> Tensor:
    """Ours. a [(B,) M, K] and b [(B,) N, K]; `pre` [M, N] also receives a b^T + bias.

    `out`, contiguous, may be float32 for 16-bit operands; with `accumulate` it is added to.
    `block`: the most rows of the result that one task computes; None: what the tuner knows.
    """
    return _gemm(a, b, None, bias, activation, residual, pre, None, out, accumulate, block)


def cpu_pair(
    a: Tensor,
    b: Tensor,
    b2: Tensor,
    activation: str,
    pre: Tensor | None = None,
    pre2: Tensor | None = None,
) -> Tensor:
    """act(a b^T) * (a b2^T) in one pass; `pre` and `pre2` also receive the two products."""
    return _gemm(a, b, b2, None, activation, None, pre, pre2, None, False)


def _gemm(
    a: Tensor,
    b: Tensor,
    b2: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    pre: Tensor | None,
    pre2: Tensor | None,
    out: Tensor | None,
    accumulate: bool,
    block: int | None = None,
) -> Tensor:
    a, b = readable(a), readable(b)
    b2 = None if b2 is None else readable(b2)
    m, k = a.shape[-2:]
    n = b.shape[-2]
    batch = a.shape[0] if a.dim() == 3 else 1
    if out is None:
        out = empty((batch, m, n) if a.dim() == 3 else (m, n), a.dtype)
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    kept = kept2 = 0
    if packed.PACKS and batch == 1 and m > THIN_ROWS:
        kept, kept2 = packed.pointer(b), 0 if b2 is None else packed.pointer(b2)
        if b2 is not None and not (kept and kept2):
            kept = kept2 = 0
    block = _block_rows(a, m, k, n) if block is None else block
    _C.gemm(
        CODES[a.dtype], CODES[out.dtype], batch, m, n, k,
        a.data_ptr(), *strides(a), b.data_ptr(), *strides(b),
        _pointer(b2), *((0, 0) if b2 is None else strides(b2)[:2]),
        kept, kept2, _pointer(bias), _pointer(residual),
        out.data_ptr(), _pointer(pre), _pointer(pre2),
        ACTIVATION_CODES[activation], 1.0, accumulate, block, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _block_rows(a: Tensor, m: int, k: int, n: int) -> int:
    """The most rows of the result for a task; 0 where the product is too small to care."""
    if m <= BLOCKS[0] or m * n * k < 1 << 24:
        return 0
    return BLOCK(a.device, m, k, n, a.stride(-1) == 1, a.dtype)["rows"]


def readable(x: Tensor) -> Tensor:
    """x itself where one of its two strides is 1, as the kernels read it."""
    rows, cols = x.stride()[-2:]
    if (cols == 1 or x.shape[-1] <= 1) or (rows == 1 or x.shape[-2] <= 1):
        return x
    return x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Row, column and batch stride; a size of 1 takes the stride that helps."""
    rows, cols = x.stride()[-2:]
    if x.shape[-1] <= 1 and cols != 1 and rows != 1:
        cols = 1
    if x.shape[-2] <= 1 and cols != 1:
        rows = 1
    elif x.shape[-2] <= 1 and rows == 1:
        rows = max(x.shape[-1], 2)
    return rows, cols, x.stride(0) if x.dim() == 3 else 0


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


# ---- the other libraries


def stock(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    pre: Tensor | None = None,
) -> Tensor:
    """torch's own mm: MKL or oneDNN, as it picks."""
    z = torch.mm(a, b.t()) if bias is None else torch.addmm(bias, a, b.t())
    return _after(z, activation, residual, pre)


def onednn(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    pre: Tensor | None = None,
) -> Tensor:
    """oneDNN through torch's own op, with the activation as its post-op where nothing else needs z.

    On plain tensors; 16-bit results keep one rounding with the activation, two with a residual.
    """
    if min(a.shape[0], b.shape[0]) < 32 or not a.shape[1]:  # nothing to gain, and sums round more
        return stock(a, b, bias, activation, residual, pre=pre)
    bias = None if bias is None else bias.contiguous()  # a strided one is read wrongly
    post = _POST_OPS.get(activation)
    if pre is not None or post is None:
        return _after(_pointwise(a, b, bias, "none", [], ""), activation, residual, pre)
    y = _pointwise(a, b, bias, *post)
    return y if residual is None else y.add_(residual)


def _after(
    z: Tensor, activation: str | None, residual: Tensor | None, pre: Tensor | None
) -> Tensor:
    if pre is not None:
        pre.copy_(z)
    if activation is not None:
        z = activate(z, activation)
    return z if residual is None else z.add_(residual)


_POST_OPS: dict[str | None, tuple] = {
    None: ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "relu": ("relu", [], ""),
}


def _pointwise(*args: Any) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(*args)


@functools.cache
def onednn_missing(dtype: torch.dtype) -> str | None:
    """Why oneDNN's linear cannot be used here, or None once a probe came out right."""
    if not torch.backends.mkldnn.is_available() or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return "this torch has no torch.ops.mkldnn._linear_pointwise"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 7, generator=generator).to(dtype) for n in (35, 33))
    bound = 16 * torch.finfo(dtype).eps
    for activation in _POST_OPS:
        for left, right in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t())):
            try:
                with torch.no_grad():
                    found = onednn(left, right, b[:, 0], activation)
            except RuntimeError as error:
                return f"torch.ops.mkldnn._linear_pointwise fails: {error}".splitlines()[0]
            expected = activate(a.double() @ b.double().t() + b[:, 0].double(), activation)
            if not torch.allclose(found.double(), expected, rtol=bound, atol=bound):
                return "torch.ops.mkldnn._linear_pointwise is wrong in a small probe"
    return None


# ---- which one

PRODUCTS: dict[str, Product] = {"cpu": cpu, "onednn": onednn, "torch": stock}


def choose(a: Tensor, b: Tensor) -> str:
    """The library for a [M, K] and b [N, K]: measured here by the tuner, else likely fastest."""
    if packed.PACKS and a.shape[0] > THIN_ROWS and packed.pointer(b):
        return "cpu"
    # whether the long side of each lies as in Y = X W^T decides, and the sizes
    sizes = (*a.shape, b.shape[0], a.stride(1) == 1, b.stride(1) == 1, a.dtype)
    return LIBRARY(a.device, *sizes)["library"]


def likely(m: int, k: int, n: int, a_along: bool, b_along: bool, dtype: torch.dtype) -> str:
    """The library that is likely fastest, from measurements on other machines.

    A thin product is bound by reading b: ours reads it at the speed of memory. Else MKL is near
    the peak on Intel in float32 and oneDNN in bfloat16 wherever there are instructions for it.
    """
    if m == 0 or n == 0 or k == 0 or k * n < 4096:
        return "torch"
    # b_along: as a weight lies; else as in dX
    if m <= THIN_ROWS and (b_along or dtype != torch.float32):
        return "cpu"
    fast, native_half, native_bf16, intel = _machine()
    if not fast:
        return "torch"
    if dtype == torch.float32:
        if m <= 32 and b_along:
            return "cpu"
        if k < 64:  # writing the result takes longer than computing it
            return "torch"
        if intel:
            return "torch"
        return "onednn" if a_along and onednn_missing(dtype) is None else "cpu"
    if dtype == torch.float16:
        return "torch" if native_half else "cpu"
    if not native_bf16:
        return "cpu"
    weight_gradient = not a_along and m >= 256 and torch.get_num_threads() > 1
    return "cpu" if _C.isa() == "amx" and weight_gradient else "torch"


def _operands(
    device: torch.device, m: int, k: int, n: int, a_along: bool, b_along: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a [M, K] and b [N, K] in the layouts that are asked for."""

    def operand(rows: int, along: bool) -> Tensor:
        shape = (rows, k) if along else (k, rows)
        made = torch.randn(shape, device=device).to(dtype)
        return made if along else made.t()

    return operand(m, a_along), operand(n, b_along)


def _can(config: dict[str, Any], device: str, m: int, k: int, n: int, *rest: Any) -> bool:
    """Whether a library is worth a measurement: oneDNN falls back to torch on small products."""
    if 0 in (m, k, n):
        return False
    if config["library"] == "onednn":
        return min(m, n) >= 32 and onednn_missing(rest[-1]) is None
    return config["library"] != "cpu" or _machine()[0]


BLOCKS = (128, 64, 32)  # gemm.inl's kBlockRows first: fewer rows, more tasks, less reuse
BLOCK = Tunable(
    "matmul.block",
    "matmul",
    configs=lambda *sizes: [{"rows": rows} for rows in BLOCKS],
    default=lambda *sizes: {"rows": BLOCKS[0]},
    build=lambda device, m, k, n, along, dtype: _operands(device, m, k, n, along, along, dtype),
    run=lambda config, a, b: cpu(a, b, block=config["rows"]),
    samples=[  # where ours may be what runs: Y and dW
        sizes
        for dtype in CODES
        for inner, outer in ((768, 3072), (1024, 1024), (4096, 4096))
        for sizes in ((512, inner, outer, True, dtype), (outer, 512, inner, False, dtype))
    ],
    fits=lambda config, device, *sizes: _C.isa() != "scalar",
    kind="cpu",
)

LIBRARY = Tunable(
    "matmul.library",
    "matmul",
    configs=lambda *sizes: [{"library": name} for name in PRODUCTS],
    default=lambda *sizes: {"library": likely(*sizes)},
    build=_operands,
    run=lambda config, a, b: PRODUCTS[config["library"]](a, b),
    samples=[  # a layer's Y, dX and dW, and a token's Y
        sizes
        for dtype in CODES
        for inner, outer in ((768, 3072), (1024, 1024), (4096, 4096))
        for sizes in (
            (1, inner, outer, True, True, dtype),
            (512, inner, outer, True, True, dtype),
            (512, outer, inner, True, False, dtype),
            (outer, 512, inner, False, False, dtype),
        )
    ],
    fits=_can,
    kind="cpu",
)


@functools.cache
def _machine() -> tuple[bool, bool, bool, bool]:
    """(our level has vectors, stock has fp16 products, stock has bf16 products, MKL is at home)"""
    flags, vendor = set[str](), ""
    try:
        with open("/proc/cpuinfo") as facts:
            for line in facts:
                if line.startswith("vendor_id"):
                    vendor = line.split(":", 1)[1].strip()
                elif line.startswith(("flags", "Features")):
                    flags = set(line.split(":", 1)[1].split())
                    break
    except OSError:
        pass
    half = "avx512_fp16" in flags or "asimdhp" in flags
    bf16 = bool({"avx512_bf16", "amx_bf16", "bf16"} & flags)
    return _C.isa() != "scalar", half, bf16, vendor == "GenuineIntel"
