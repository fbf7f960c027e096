"""Quantization: fewer bits for weights, activations and caches.

q = fastllm.quant.quantize(weight, "int4_g32")     # a QTensor: codes, scales
q.dequantize(); q.nbytes
"""

from fastllm.quant.formats import PRESETS as PRESETS
from fastllm.quant.formats import Format as Format
from fastllm.quant.formats import parse as parse
from fastllm.quant.qtensor import QTensor as QTensor
from fastllm.quant.qtensor import dequantize as dequantize
from fastllm.quant.qtensor import quantize as quantize
