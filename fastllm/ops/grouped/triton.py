"""grouped_linear in Triton: fastllm.kernels.grouped_matmul, imported by the first call."""

import importlib
from typing import Any

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.triton import available, supports, tf32


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.grouped_matmul")


def grouped_linear(input: Tensor, weights: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return _kernels().grouped_matmul(input, weights.mT, offsets, bias, tf32=tf32(input))


def grouped_linear_backward(
    grad_output: Tensor,
    input: Tensor,
    weights: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """(grad_input, grad_weights, grad_bias), None where not needed."""
    dy, run, experts, fast = grad_output, _kernels(), weights.shape[0], tf32(input)
    return (
        run.grouped_matmul(dy, weights, offsets, tf32=fast) if needs[0] else None,
        run.grouped_weight_grad(dy, input, offsets, experts, tf32=fast) if needs[1] else None,
        run.grouped_bias_grad(dy, offsets, experts) if needs[2] and bias is not None else None,
    )


BACKEND: Backend = Backend("triton", grouped_linear, grouped_linear_backward, supports, available)
