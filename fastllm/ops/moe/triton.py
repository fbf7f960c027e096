"""moe_permute and moe_unpermute in Triton: fastllm.kernels.moe, imported by the first call."""

import importlib
from typing import Any

from torch import Tensor

from fastllm.core.backend import Backend
from fastllm.ops.matmul.triton import available, supports


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.moe")


def moe_permute(input: Tensor, position: Tensor) -> Tensor:
    return _kernels().spread(input, position, None)


def moe_permute_backward(
    grad_output: Tensor, input: Tensor, position: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """(grad_input,), None where not needed."""
    return (_kernels().combine(grad_output, position, None) if needs[0] else None,)


def moe_unpermute(rows: Tensor, position: Tensor, weights: Tensor | None) -> Tensor:
    return _kernels().combine(rows, position, weights)


def moe_unpermute_backward(
    grad_output: Tensor,
    rows: Tensor,
    position: Tensor,
    weights: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """(grad_rows, grad_weights), None where not needed."""
    run, dweights = _kernels(), None
    drows = run.spread(grad_output, position, weights) if needs[0] else None
    if needs[1] and weights is not None:
        dweights = run.weight_grad(grad_output, rows, position, weights.dtype)
    return drows, dweights


BACKENDS: dict[str, Backend] = {
    "moe_permute": Backend("triton", moe_permute, moe_permute_backward, supports, available),
    "moe_unpermute": Backend("triton", moe_unpermute, moe_unpermute_backward, supports, available),
}
