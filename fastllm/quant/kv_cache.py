"""A key/value cache in 8- or 4-bit codes: quantized as tokens come, a scale a token and head.

KIVI (Liu et al. 2024) has asymmetric groups; here they lie within a token, so that appending never
touches what is there.
"""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.op import describe
from fastllm.functional import attention_with_kv_cache
from fastllm.ops import quant as ops
from fastllm.ops.attention.quantized import Codes
from fastllm.quant.formats import Format, parse


class QuantizedStates:
    """Keys, or values, of one layer: [B, G, S, D] as codes, with room that doubles.

    `format`: a name or a Format whose groups lie within a row: "int8", "int4_asym_g32", "fp8", ...
    What is appended is never read again; NaN and infinity come back as NaN.
    """

    def __init__(self, format: str | Format = "int8") -> None:
        self.format = parse(format)
        if self.format.group < 0 or self.format.double:
            raise ValueError(
                f"format: expected groups within a token, found {self.format} for a cache"
            )
        self.length = 0
        self.parts: tuple[Tensor, ...] = ()  # codes, scales, zeros: [B, G, room, .]
        self.size = 0  # D

    def append(self, states: Tensor) -> None:
        """Writes [B, G, T, D] behind what is there."""
        self._check(states)
        made = self._quantize(states)
        count = states.shape[2]
        if not self.length or self.length + count > self.parts[0].shape[2]:
            self._grow(made, self.length + count)
        for part, new in zip(self.parts, made, strict=True):
            part[:, :, self.length : self.length + count] = new
        self.length += count
        self.size = states.shape[3]

    def read(self, start: int = 0, stop: int | None = None, dtype: Any = torch.float32) -> Tensor:
        """The values of tokens [start, stop) as [B, G, stop - start, D]."""
        stop = self.length if stop is None else stop
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"start, stop: expected 0 to {self.length}, found {start}, {stop}")
        codes, scales, *zeros = (p[:, :, start:stop] for p in self.parts)
        form = self.format
        none = zeros[0] if zeros else scales.new_empty(0)
        return ops.dequantize(codes, scales, none, form.code, form.group, self.size, dtype)

    def stored(self) -> Codes:
        """The codes as `attention_with_kv_cache` takes them, with the room behind them."""
        codes, scales, *zeros = self.parts
        return Codes(
            codes, scales, zeros[0] if zeros else None, self.format.code, self.format.group,
            self.size,
        )  # fmt: skip

    def truncate(self, length: int) -> None:
        """Forgets all tokens from this one on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, found {length}")
        self.length = length

    def select(self, indices: Tensor) -> None:
        """Keeps these sequences, in this order, any of them several times."""
        self.parts = tuple(p.index_select(0, indices.to(p.device)) for p in self.parts)

    def to(self, device: Any) -> None:
        """Moves the codes to a device."""
        self.parts = tuple(p.to(device) for p in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are there, scales included."""
        return sum(p[:, :, : self.length].nbytes for p in self.parts)

    def _quantize(self, states: Tensor) -> tuple[Tensor, ...]:
        form = self.format
        codes, scales, zeros = ops.quantize(states, form.code, form.group, form.symmetric)
        return (codes, scales) if form.symmetric else (codes, scales, zeros)

    def _check(self, states: Any) -> None:
        if not isinstance(states, Tensor) or states.dim() != 4:
            found = describe(states) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"states: expected a Tensor [B, G, T, D], found {found}")
        if self.length:
            wanted = (*self.parts[0].shape[:2], states.shape[2], self.size)
            if tuple(states.shape) != wanted:
                raise ValueError(f"states: expected {list(wanted)}, found {describe(states)}")

    def _grow(self, like: tuple[Tensor, ...], length: int) -> None:
        room = max(256, 1 << (length - 1).bit_length())
        old, self.parts = (
            self.parts,
            tuple(p.new_empty((*p.shape[:2], room, p.shape[3])) for p in like),
        )
        for part, before in zip(self.parts, old if self.length else (), strict=False):
            part[:, :, : self.length] = before[:, :, : self.length]


class QuantizedKVCache:
    """Keys and values of one layer, quantized; all sequences are as long as each other.

        cache = QuantizedKVCache("int8")
        out = cache.attend(query, k, v)        # appends k and v, attends to all that is there

    keys, values   a format each: "int8" (8.25 bits a number at D = 128), "int4_asym_g32" (5), "fp8"
    """

    def __init__(self, keys: str | Format = "int8", values: str | Format | None = None) -> None:
        self.keys = QuantizedStates(keys)
        self.values = QuantizedStates(keys if values is None else values)

    def __len__(self) -> int:
        return self.keys.length

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def append(self, k: Tensor, v: Tensor) -> None:
        """Writes k [B, G, T, D] and v [B, G, T, Dv] behind what is there."""
        for states in (k, v):
            self.keys._check(states) if states is k else self.values._check(states)
        if k.shape[:3] != v.shape[:3]:
            raise ValueError(f"v: expected {list(k.shape[:3])} and Dv, found {describe(v)}")
        self.keys.append(k)
        self.values.append(v)

    def attend(
        self,
        query: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        is_causal: bool = True,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """Appends k and v, if given, and attends to the whole cache: [B, H, T, Dv]. No gradient.

        The arguments are those of `fastllm.functional.attention_with_kv_cache`, which runs here: a
        few queries read int8 and int4 codes as they are, a prompt has all of them dequantized.
        """
        if (k is None) != (v is None):
            raise ValueError("v: expected with k, or neither of them")
        if k is not None and v is not None:
            self.append(k, v)
        if not len(self):
            raise ValueError("k: expected keys and values for a cache that is empty, found None")
        keys, values = self.keys.stored(), self.values.stored()
        used = torch.full((query.shape[0],), len(self), dtype=torch.int32, device=query.device)
        return attention_with_kv_cache(
            query, keys, values, used, is_causal=is_causal, scale=scale, window=window,
            softcap=softcap, sinks=sinks, backend=backend,
        )  # fmt: skip
