"""QuantizedCache: a transformers cache whose keys and values are kept in 8- or 4-bit codes."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, DynamicLayer

from fastllm.ops.attention.quantized import Codes
from fastllm.quant.formats import Format, parse
from fastllm.quant.kv_cache import QuantizedKVCache, QuantizedStates


class CachedStates(Tensor):
    """Looks like all keys, or values, of a layer; anything computed with it dequantizes them.

    Attention by fastllm asks for the codes instead: `stored()`.
    """

    states: QuantizedStates

    @staticmethod
    def __new__(cls, states: QuantizedStates, like: Tensor) -> "CachedStates":
        shape = (*like.shape[:2], states.length, states.size)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.states = states
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CachedStates({list(self.shape)}, {self.dtype}, {self.states.format})"

    def stored(self) -> Codes:
        """The codes, and the room behind them."""
        return self.states.stored()

    def dense(self) -> Tensor:
        """The numbers."""
        return self.states.read(0, self.shape[2], self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        dense = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*dense[0], **dense[1])


class QuantizedLayer(DynamicLayer):
    """One layer of a QuantizedCache."""

    def __init__(self, keys: str | Format, values: str | Format) -> None:
        super().__init__()
        self.formats = keys, values
        self.cache = QuantizedKVCache(keys, values)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends; returns all keys and values, those just appended as later steps see them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cache.append(key_states, value_states)
        if key_states.shape[2] == 1 and not torch.compiler.is_compiling():
            return (
                CachedStates(self.cache.keys, key_states),
                CachedStates(self.cache.values, value_states),
            )
        return self.cache.keys.read(dtype=self.dtype), self.cache.values.read(dtype=self.dtype)

    def get_seq_length(self) -> int:
        return len(self.cache)

    def reset(self) -> None:
        self.cache = QuantizedKVCache(*self.formats)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -tokens_to_remove tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected 0 or less, found {tokens_to_remove}")
        for states in (self.cache.keys, self.cache.values):
            states.truncate(max(0, states.length + tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if len(self.cache):
            self.cache.keys.select(beam_idx)
            self.cache.values.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences; a mask of them, too."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if len(self.cache):
            count = self.cache.keys.parts[0].shape[0]
            self.reorder_cache(torch.arange(count).repeat_interleave(repeats))

    def offload(self) -> None:
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: Any) -> None:
        self.cache.keys.to(device)
        self.cache.values.to(device)


class QuantizedCache(Cache):
    """`past_key_values` of any transformers model, in a quarter to a half of the memory.

        model.generate(**inputs, past_key_values=fastllm.quant.QuantizedCache("int8"))

    keys, values   a format each (a name or a Format) whose groups lie within a token and head:
                   "int8", "int4_asym_g32", "fp8", ...

    Where attention goes through fastllm (attn_implementation="fastllm", or after `fastllm.swap`),
    a step without a mask reads the codes as they are (`attention_with_kv_cache`); elsewhere a model
    asks for all keys and values, which are dequantized for one layer at a time.
    Every token is as its codes say from the first step on, so that the result does not depend on
    how a prompt is cut into chunks.
    """

    def __init__(self, keys: str | Format = "int8", values: str | Format | None = None) -> None:
        formats = parse(keys), parse(keys if values is None else values)
        QuantizedLayer(*formats)  # says now what is wrong with them
        super().__init__(layer_class_to_replicate=lambda: QuantizedLayer(*formats))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' keys and values."""
        layers = [layer for layer in self.layers if isinstance(layer, QuantizedLayer)]
        return sum(layer.cache.nbytes for layer in layers)
