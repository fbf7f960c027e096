"""Stock PyTorch: the same formulas as torch's own functions, one after the other."""

from fastllm.core.backend import Backend
from fastllm.ops.quant import reference

BACKENDS: dict[str, Backend] = {
    "quantize": Backend("torch", reference.quantize),
    "dequantize": Backend("torch", reference.dequantize),
    "encode": Backend("torch", reference.encode),
    "fake_quantize": Backend("torch", reference.fake_quantize),
}
