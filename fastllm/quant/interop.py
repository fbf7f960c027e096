"""Reads other libraries' quantized weights, given as state dicts, into QTensors.

    q = read_bitsandbytes(state, "model.layers.0.mlp.up_proj.")     # 4-bit and 8-bit
    q = read_gptq(state, "model.layers.0.mlp.up_proj.")
    q = read_awq(state, "model.layers.0.mlp.up_proj.")

Codes stay what they are, only in another order: the values are those of the other library, up to
the rounding of a scale. `prefix` is what comes before the names of the layer's tensors.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastllm.core.op import describe
from fastllm.ops.quant import layout
from fastllm.quant.formats import Format
from fastllm.quant.qtensor import QTensor

State = Mapping[str, Tensor]

# AWQ's bits 4i to 4i + 3 of a word hold the column of this number, among its eight
_AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def _need(state: State, name: str) -> Tensor:
    if name not in state:
        raise KeyError(f"state: expected a tensor {name!r}, found none")
    return state[name]


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        wanted = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
        raise ValueError(f"{name}: expected {wanted}, found {describe(tensor)}")


def _none(like: Tensor) -> Tensor:
    return like.new_empty(0)


# ---- bitsandbytes


def read_bitsandbytes(state: State, prefix: str = "") -> QTensor:
    """The weight of a bitsandbytes Linear4bit (nf4, fp4; nested scales, too) or Linear8bitLt.

    4-bit: bytes whose high nibble comes first, blocks over the flattened weight, absmax a block (in
    codes of their own, with `nested_` tensors, where compress_statistics was on). 8-bit: rows of
    int8, `SCB` their largest magnitudes. Raises KeyError for a tensor that is missing and
    ValueError for a layout that is none of these, or whose blocks do not end with the rows.
    """
    for kind in ("nf4", "fp4"):
        name = f"{prefix}weight.quant_state.bitsandbytes__{kind}"
        if name in state:
            facts = json.loads(bytes(state[name].cpu().tolist()).decode())
            return _read_4bit(state, f"{prefix}weight", kind, facts)
    if f"{prefix}SCB" in state or f"{prefix}weight.SCB" in state:
        return _read_8bit(state, prefix)
    raise KeyError(
        f"state: expected {prefix}weight.quant_state.bitsandbytes__nf4 (or fp4) or {prefix}SCB, "
        f"found {sorted(n for n in state if n.startswith(prefix))[:8]}"
    )


def _read_4bit(state: State, name: str, kind: str, facts: dict[str, Any]) -> QTensor:
    shape, block = tuple(facts["shape"]), int(facts["blocksize"])
    dtype = getattr(torch, facts["dtype"])
    code = layout.KINDS.index(kind)
    table = _need(state, f"{name}.quant_map").float()
    wanted = layout.table(code, table)
    if table.shape != wanted.shape or not torch.allclose(table, wanted, rtol=0, atol=1e-6):
        raise ValueError(f"{name}.quant_map: expected {kind}'s 16 numbers, found {table.tolist()}")
    if not shape or shape[-1] % block:
        raise ValueError(f"{name}: expected rows of whole blocks of {block}, found shape {shape}")
    count = math.prod(shape)
    packed = _need(state, name)
    if packed.dtype != torch.uint8 or packed.numel() != count // 2:
        raise ValueError(f"{name}: expected {count // 2} bytes, found {describe(packed)}")
    codes = (packed.flatten() << 4 | packed.flatten() >> 4).view(*shape[:-1], shape[-1] // 2)
    scales = _absmax(state, name, facts).view(*shape[:-1], shape[-1] // block)
    form = Format(kind, block)
    return QTensor(form, codes, scales, _none(scales), shape, dtype)


def _absmax(state: State, name: str, facts: dict[str, Any]) -> Tensor:
    """The blocks' largest magnitudes, those of nested statistics decoded."""
    absmax = _need(state, f"{name}.absmax")
    if "nested_blocksize" not in facts:
        return absmax.float()
    table = _need(state, f"{name}.nested_quant_map").float()
    outer = _need(state, f"{name}.nested_absmax").float()
    each = outer.repeat_interleave(int(facts["nested_blocksize"]))[: absmax.numel()]
    offset = float(facts.get("nested_offset", 0.0))
    return table[absmax.flatten().long()] * each + offset


def _read_8bit(state: State, prefix: str) -> QTensor:
    codes = _need(state, f"{prefix}weight")
    name = f"{prefix}SCB" if f"{prefix}SCB" in state else f"{prefix}weight.SCB"
    kind = state.get(f"{prefix}weight_format")
    if kind is not None and kind.numel() and int(kind.flatten()[0]) != 0:
        raise ValueError(f"{prefix}weight_format: expected 0 (rows), found {kind.tolist()}")
    if codes.dtype != torch.int8 or codes.dim() != 2:
        raise ValueError(f"{prefix}weight: expected int8 [N, K], found {describe(codes)}")
    absmax = state[name].float().flatten()
    _expect(name, absmax, torch.float32, (codes.shape[0],))
    scales = (absmax / 127)[:, None]
    return QTensor(
        Format("int8"), codes.contiguous(), scales, _none(scales), tuple(codes.shape), torch.float16
    )


# ---- words of eight nibbles


def _nibbles(words: Tensor) -> Tensor:
    """int32 [.., W] as uint8 [.., 8 W], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _weight(nibbles: Tensor, zeros: Tensor, scales: Tensor, name: str) -> QTensor:
    """[K, N] nibbles with [groups, N] zeros and scales as a QTensor [N, K]."""
    k, n = nibbles.shape
    groups = scales.shape[0]
    if not groups or k % groups:
        raise ValueError(
            f"{name}scales: expected a divisor of {k} groups, found {describe(scales)}"
        )
    size = k // groups
    _expect(f"{name}scales", scales, scales.dtype, (groups, n))
    _expect(f"{name}qzeros", zeros, torch.uint8, (groups, n))
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name}scales: expected floating point, found {describe(scales)}")
    form = Format("int4", size, symmetric=False, scale_dtype=scales.dtype)
    codes = layout.pack(nibbles.t().contiguous(), 0)
    own = scales.t().contiguous()
    return QTensor(form, codes, own, zeros.t().to(own.dtype).contiguous(), (n, k), scales.dtype)


def read_gptq(state: State, prefix: str = "", *, v2: bool = False) -> QTensor:
    """The weight of a 4-bit GPTQ layer: qweight, qzeros, scales and, if there is one, g_idx.

    A word of qweight [K / 8, N] holds eight neighbours along K, one of qzeros [groups, N / 8] eight
    columns; zeros are stored less 1, unless `v2` (checkpoint_format "gptq_v2"). Raises KeyError for
    a tensor that is missing, ValueError for other bits and for act-order, whose groups are no
    neighbours.
    """
    words, packed = _need(state, f"{prefix}qweight"), _need(state, f"{prefix}qzeros")
    scales = _need(state, f"{prefix}scales")
    _check_words(words, packed, prefix)
    k, n = 8 * words.shape[0], words.shape[1]
    if scales.dim() != 2 or scales.shape[1] != n or packed.shape[1] * 8 != n:
        raise ValueError(
            f"{prefix}qzeros: expected [groups, {n} / 8] for 4 bits, found {describe(packed)} with "
            f"scales {describe(scales)}"
        )
    order = state.get(f"{prefix}g_idx")
    size = k // max(1, scales.shape[0])
    if order is not None and not torch.equal(order.cpu().long(), torch.arange(k) // size):
        raise ValueError(f"{prefix}g_idx: expected groups of {size} neighbours, found act-order")
    nibbles = _nibbles(words.t()).t()  # [K, N]
    zeros = _nibbles(packed) + (0 if v2 else 1)
    return _weight(nibbles, zeros, scales, prefix)


def read_awq(state: State, prefix: str = "") -> QTensor:
    """The weight of a 4-bit AWQ layer (the GEMM layout): qweight, qzeros and scales.

    A word of qweight [K, N / 8] or qzeros [groups, N / 8] holds eight columns, in the order 0, 2,
    4, 6, 1, 3, 5, 7. Raises KeyError for a tensor that is missing, ValueError for another layout.
    """
    words, packed = _need(state, f"{prefix}qweight"), _need(state, f"{prefix}qzeros")
    scales = _need(state, f"{prefix}scales")
    _check_words(words, packed, prefix)
    if words.shape[1] != packed.shape[1] or scales.dim() != 2:
        raise ValueError(f"{prefix}qzeros: expected the words of {describe(words)}, a row a group")
    place = torch.tensor(_AWQ_COLUMNS, device=words.device).argsort()

    def columns(found: Tensor) -> Tensor:
        return _nibbles(found).unflatten(-1, (-1, 8))[..., place].flatten(-2)

    return _weight(columns(words), columns(packed), scales, prefix)


def _check_words(words: Tensor, packed: Tensor, prefix: str) -> None:
    for name, value in (("qweight", words), ("qzeros", packed)):
        if value.dtype != torch.int32 or value.dim() != 2:
            raise ValueError(f"{prefix}{name}: expected an int32 matrix, found {describe(value)}")
