"""quant_linear: a linear layer whose weight is codes, forward and backward."""

import torch
from torch import Tensor

from fastllm.core.autocast import cast, casting
from fastllm.core.dispatch import define
from fastllm.ops.quant_linear import cpu, cuda, reference, spec, stock, triton
from fastllm.ops.quant_linear.cases import cases

quant_linear_op = define(
    "quant_linear",
    (cpu.BACKEND, triton.BACKEND, cuda.BACKEND, stock.BACKEND),
    reference,
    family="quant_linear",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3, 4, 5),
    saved_tensors=(0, 1, 2, 3, 4, 5),
    gradients={0: 0, 4: 1},
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
    autocast_composite=("cpu", "cuda"),
)


def quant_linear(
    input: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    code: int,
    group: int,
    activations: str | int = "float",
    act_scale: Tensor | None = None,
    activation: str | None = None,
    outlier_threshold: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(input W^T + bias), where W = dequantize(codes, scales, zeros, code, group).

    input        [*, K] float32, bfloat16, float16 (float64 in plain torch)
    codes        [N, K], or [N, ceil(K / 2)] with two codes a byte; scales, zeros, code and group as
                 `quantize` makes them
    bias         [N] of input's dtype, or None; added in float32
    activations  "float": input as it is. "dynamic" (int8 and int4 weights): each token rounded to
                 int8 with the scale max |x| / 127. "static": with `act_scale`
    activation   None, or what fastllm.functional.linear takes: "gelu", "gelu_tanh", "silu", ...;
                 in the same pass, before the only rounding
    outlier_threshold  with rounded activations: the columns of input in which a magnitude exceeds
                 it are multiplied in float, the others in int8 (LLM.int8, Dettmers et al. 2022;
                 6.0 there). Infinite values then count as in a float layer
    backend      forces one of fastllm's backends for this call

    Returns [*, N] in input's dtype. Input and bias have gradients (rounded activations: straight
    through), codes have none. A token with NaN or infinity is NaN where activations are rounded.
    Raises ValueError or TypeError for arguments that do not fit, fastllm.UnsupportedError when
    `backend` cannot serve the call.
    """
    mode = spec.ACTIVATIONS.get(activations, -1) if isinstance(activations, str) else activations
    rest = act_scale, code, group, mode, activation, float(outlier_threshold or 0.0)
    kind = casting(input)
    if kind is not None:
        input, bias = cast(kind, input, bias)
        with torch.autocast(kind, enabled=False):
            return quant_linear_op(input, codes, scales, zeros, bias, *rest, backend=backend)
    return quant_linear_op(input, codes, scales, zeros, bias, *rest, backend=backend)
