"""What attention's kernels share: scores of a block, which keys it sees, dropout, inputs."""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from fastllm.kernels.loss import _tanh


@triton.jit
def bounds(cu_ptr, b, length, batch):
    """(first row, length) of sequence b: of packed rows, clamped to those that exist."""
    if cu_ptr is None:
        return b * 0, length
    else:
        last = tl.load(cu_ptr + batch)
        begin = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), last)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), begin), last)
        return begin.to(tl.int64), tl.minimum(end - begin, length)


@triton.jit
def read(ptr, row, stride, ROWS, D, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `row` of a head, [rows, BLOCK_D], 0 where there is nothing."""
    d = tl.arange(0, BLOCK_D)
    at = ptr + row.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(at, mask=(row < ROWS)[:, None] & (d < D)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)


@triton.jit
def seen(row, col, S, left, right, diagonal, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys `col` the queries `row` see, by position alone."""
    inside = (col < S) & (row >= 0)
    if HAS_LEFT:
        inside = inside & (col - row - diagonal >= -left)
    if HAS_RIGHT:
        inside = inside & (col - row - diagonal <= right)
    return inside


@triton.jit
def span(
    first,
    last,
    S,
    diagonal,
    left,
    right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(begin, whole, rest, end): of the keys that rows first..last see, all see whole..rest.

    begin, whole and rest are multiples of BLOCK; blocks in begin..whole and rest..end need a mask.
    """
    begin, end = 0, S
    whole, rest = 0, S // BLOCK * BLOCK
    if HAS_LEFT:
        begin = tl.maximum(0, first + diagonal - left) // BLOCK * BLOCK
        whole = tl.cdiv(tl.maximum(0, last + diagonal - left), BLOCK) * BLOCK
    if HAS_RIGHT:
        end = tl.maximum(0, tl.minimum(S, last + diagonal + right + 1))
        rest = tl.maximum(0, tl.minimum(S, first + diagonal + right + 1)) // BLOCK * BLOCK
    begin = tl.minimum(begin, tl.cdiv(end, BLOCK) * BLOCK)
    whole = tl.minimum(tl.maximum(whole, begin), tl.cdiv(end, BLOCK) * BLOCK)
    return begin, whole, tl.maximum(rest, whole), end


@triton.jit
def adjusted(
    s,
    mask_ptr,
    row,
    col,
    T,
    S,
    stride_mt,
    stride_ms,
    softcap,
    slope,
    diagonal,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
):
    """Scores after softcap, ALiBi and the mask; row and col broadcast to their shape."""
    if SOFTCAP:
        s = softcap * _tanh(s / softcap)
    if ALIBI:
        s -= slope * tl.abs(row + diagonal - col).to(tl.float32)
    if mask_ptr is not None:
        at = row.to(tl.int64) * stride_mt + col.to(tl.int64) * stride_ms
        inside = (row < T) & (col < S)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(mask_ptr + at, mask=inside, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(mask_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def softcap_slope(s, softcap):
    """d/ds of softcap * tanh(s / softcap)."""
    e = tl.exp(-2.0 * tl.abs(s / softcap))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(seed, head, row, col, threshold):
    """Which probabilities dropout keeps: fastllm/ops/attention/random.py in 32 bits."""
    golden = tl.full([], 0x9E3779B9, tl.uint32)
    low = tl.cast(seed & 0xFFFFFFFF, tl.uint32)
    high = tl.cast((seed >> 32) & 0xFFFFFFFF, tl.uint32)
    a = _mix(low + golden * tl.cast(head, tl.uint32))
    c = _mix(high ^ a)
    row_a = _mix(a + golden * tl.cast(row, tl.uint32))
    row_b = _mix(c ^ row_a)
    x = row_a + golden * tl.cast(col, tl.uint32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ row_b
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return x >= tl.cast(threshold, tl.uint32)


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers of a call; bottom: each packed sequence has its diagonal at the bottom right."""

    scale: float
    left: int
    right: int
    diagonal: int
    softcap: float
    threshold: int = 0
    factor: float = 1.0
    dropout: bool = False
    bottom: bool = False


@dataclasses.dataclass(frozen=True)
class Shape:
    """The inputs of a call: [B, H, T, D], or packed [tokens, H, D] with cu_q and cu_k."""

    q: Any
    k: Any
    v: Any
    mask: Any = None  # uint8 or floating, broadcastable to [B, H, T, S]
    slopes: Any = None
    sinks: Any = None
    seed: Any = None
    cu_q: Any = None
    cu_k: Any = None
    most_q: int = 0
    most_k: int = 0
    tf32: bool = False

    @property
    def batch(self):
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def heads(self):
        return self.q.shape[1]

    @property
    def groups(self):
        return self.k.shape[1]

    @property
    def t(self):
        return self.q.shape[2] if self.cu_q is None else self.most_q

    @property
    def s(self):
        return self.k.shape[2] if self.cu_k is None else self.most_k

    @property
    def d(self):
        return self.q.shape[-1]

    @property
    def dv(self):
        return self.v.shape[-1]

    def strides(self, x):
        """(batch, head, row) strides of an input, an output or an lse."""
        if self.cu_q is None:
            return x.stride()[:3]
        return 0, x.stride(1), x.stride(0)

    def mask_strides(self, mask):
        """Strides of a mask as it broadcasts."""
        if mask is None:
            return 0, 0, 0, 0
        return tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))

    def slopes_stride(self):
        """How far apart the slopes of two sequences are."""
        return 0 if self.slopes is None or self.slopes.dim() == 1 else self.slopes.stride(0)

    def results(self):
        """Empty (out, lse)."""
        rows = self.q.shape[:-1]
        out = torch.empty((*rows, self.dv), dtype=self.q.dtype, device=self.q.device)
        return out, torch.empty(rows, dtype=torch.float32, device=self.q.device)

    def describable(self):
        """Whether TMA can describe keys and values: 16-byte bases and strides, no padding."""
        if self.cu_q is not None or self.q.dtype == torch.float32:
            return False
        for x in (self.k, self.v):
            base = x.storage_offset() * x.element_size() if x.is_meta else x.data_ptr()
            sizes = [n * x.element_size() for n in x.stride()[:3]]
            if x.stride(-1) != 1 or base % 16 or any(n % 16 or not n for n in sizes):
                return False
        return True
