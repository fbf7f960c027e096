"""Quantization: fewer bits for weights, activations and caches.

q = fastllm.quant.quantize(weight, "int4_g32")     # a QTensor: codes, scales
q.dequantize(); q.nbytes

handle = fastllm.quantize(model, "int8")           # a whole model, in place: models.py
print(handle.report()); handle.restore()
"""

import importlib
import sys
from contextlib import suppress
from typing import Any

from fastllm.quant.config import Config as Config
from fastllm.quant.fake import fake_quantize as fake_quantize
from fastllm.quant.formats import PRESETS as PRESETS
from fastllm.quant.formats import Format as Format
from fastllm.quant.formats import parse as parse
from fastllm.quant.int8_training import prepare_int8_training as prepare_int8_training
from fastllm.quant.interop import read_awq as read_awq
from fastllm.quant.interop import read_bitsandbytes as read_bitsandbytes
from fastllm.quant.interop import read_gptq as read_gptq
from fastllm.quant.kv_cache import QuantizedKVCache as QuantizedKVCache
from fastllm.quant.linear import QuantLinear as QuantLinear
from fastllm.quant.models import Handle as Handle
from fastllm.quant.models import float_state_dict as float_state_dict
from fastllm.quant.pruning import prune as prune
from fastllm.quant.qat import convert_qat as convert_qat
from fastllm.quant.qat import prepare_qat as prepare_qat
from fastllm.quant.qtensor import QTensor as QTensor
from fastllm.quant.qtensor import dequantize as dequantize
from fastllm.quant.qtensor import quantize as quantize
from fastllm.quant.sparse import SparseLinear as SparseLinear
from fastllm.quant.sparse import to_dense as to_dense
from fastllm.quant.sparse import to_sparse as to_sparse
from fastllm.quant.structured import prune_channels as prune_channels
from fastllm.quant.structured import prune_heads as prune_heads

_LAZY = {"QuantizedCache": "transformers_cache"}  # needs transformers


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"fastllm.quant.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_transformers() -> None:
    """Makes transformers' `from_pretrained` read models that were quantized and saved.

    Needed only where fastllm was imported before transformers and nothing has been quantized.
    Raises ImportError without transformers.
    """
    importlib.import_module("fastllm.quant.pretrained")


if "transformers" in sys.modules:
    with suppress(ImportError):  # of a version without quantizers to register
        register_transformers()
