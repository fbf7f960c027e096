"""`weight` of a quantized layer: shape, dtype and device at no cost, numbers when asked for."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

READ_ONLY = (
    "weight: it is computed from codes, so what is written into it would be lost; assign "
    "`layer.weight.data`, or call `layer.set_weight(value)`, to quantize another one"
)

_NEED_MEMORY = (
    Tensor.numpy,
    Tensor.tolist,
    Tensor.data_ptr,
    Tensor.__reduce_ex__,
    Tensor.__deepcopy__,
    Tensor.__array__,
)


class LazyWeight(Tensor):
    """Looks like the weight [out_features, in_features]; anything computed with it dequantizes.

    Other libraries ask a linear for weight.dtype or weight.device on every call. Writing into it
    raises RuntimeError, but for `weight.data = value` (as PEFT merges), which quantizes `value`.
    """

    layer: Any
    _is_hf_initialized = True  # else transformers draws random numbers for it after loading

    @staticmethod
    def __new__(cls, layer: Any, like: Tensor) -> "LazyWeight":
        shape = (layer.out_features, layer.in_features)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.layer = layer
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyWeight({list(self.shape)}, {self.dtype}, {self.layer.format})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].layer.dense()
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return args[0].layer.set_weight(args[1])
        if func == Tensor.__setitem__:
            raise RuntimeError(READ_ONLY)
        if func in _NEED_MEMORY:
            return func(args[0].layer.dense(), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = zip(func._schema.arguments, args, strict=False)
        if any(isinstance(a, cls) and s.alias_info and s.alias_info.is_write for s, a in given):
            raise RuntimeError(READ_ONLY)
        dense = tree_map_only(cls, lambda w: w.layer.dense(), (args, kwargs or {}))
        return func(*dense[0], **dense[1])
