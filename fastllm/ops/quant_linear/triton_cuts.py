"""How Triton's quantized products are cut: measured where somebody tuned, else the heuristic's."""

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.tuner.tunable import Tunable
from fastllm.ops.quant import reference as quant
from fastllm.ops.quant.layout import INT4, INT8, NF4, TABLES
from fastllm.ops.quant_linear import reference


def _kernels() -> Any:
    return importlib.import_module("fastllm.kernels.quant_matmul")


def pick(x: Tensor, n: int, code: int, group: int, dtype: torch.dtype) -> Any:
    """The config for x [M, K] of floats or int8, N rows of codes, a result of this dtype; None
    where nothing is measured: meta tensors and Triton's interpreter."""
    if not x.is_cuda:
        return None
    sizes = (*x.shape, n, code, group, x.dtype == torch.int8, dtype)
    return _kernels().QuantConfig(**CUTS(x.device, *sizes))


def _configs(
    m: int, k: int, n: int, code: int, group: int, integer: bool, dtype: torch.dtype
) -> list[dict[str, Any]]:
    return [dataclasses.asdict(c) for c in _kernels().configs(m, max(group, -group, 0))]


def _default(
    m: int, k: int, n: int, code: int, group: int, integer: bool, dtype: torch.dtype
) -> dict[str, Any]:
    sms = 132  # an H100's
    if torch.cuda.is_available():
        sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    shared = -group if group < -1 else max(group, 0)
    return dataclasses.asdict(_kernels().heuristic(m, n, k, shared, integer, sms))


def _operands(
    device: torch.device,
    m: int,
    k: int,
    n: int,
    code: int,
    group: int,
    integer: bool,
    dtype: torch.dtype,
) -> tuple:
    """x, codes, scales and the scales of tokens, and what the run is told of them."""
    codes, scales, _ = quant.quantize(torch.randn(n, k) * k**-0.5, code, group, True)
    x, token_scales = torch.randn(m, k), None
    if integer:
        rounded, each = reference.quantize_tokens(x, None)
        x, token_scales = rounded.to(torch.int8), each.view(-1).to(device)
    else:
        x = x.to(dtype)
    return x.to(device), codes.to(device), scales.to(device), token_scales, code, group, k, dtype


def _run(config: dict[str, Any], *operands: Any) -> Tensor:
    x, codes, scales, token_scales, code, group, k, dtype = operands
    values = TABLES.get(code)
    table = None if values is None else torch.tensor(values, device=x.device)
    run = _kernels()
    return run.quant_matmul(
        x, codes, scales, None, None, code, group, k, table=table, token_scales=token_scales,
        dtype=dtype, config=run.QuantConfig(**config),
    )  # fmt: skip


CUTS = Tunable(
    "quant_linear.triton",
    "quant_linear",
    configs=_configs,
    default=_default,
    build=_operands,
    run=_run,
    samples=[
        (m, 4096, n, code, group, integer, torch.bfloat16)
        for n in (4096, 11008)
        for m in (1, 16, 64, 2048)
        for code, group, integer in (
            (INT8, 0, False),
            (INT8, 0, True),
            (INT4, 32, False),
            (NF4, 64, False),
        )
    ],
    kind="cuda",
)
