"""Block shapes of the Triton products, measured where somebody tuned, else the heuristic's."""

import dataclasses
import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.tuner.tunable import Tunable


def _matmul() -> Any:
    return importlib.import_module("fastllm.kernels.matmul")


def _tiles() -> Any:
    return importlib.import_module("fastllm.kernels.tiles")


def pick(a: Tensor, b: Tensor, products: int, plain: bool, tf32: bool) -> Any:
    """The config of act(a b): a [M, K], b [K, N]; two products for a gated pair."""
    more = (a.dtype, products, plain, tf32)
    if not a.is_cuda:  # meta tensors and Triton's interpreter: nothing is measured there
        return _matmul().heuristic(a.device, *a.shape, b.shape[1], *more)
    along = (a.stride(1) == 1, b.stride(0) == 1)
    return _tiles().Config(**TILES(a.device, *a.shape, b.shape[1], *along, *more))


def _here() -> torch.device:
    """The GPU that is current; without one, what stands for an H100."""
    if not torch.cuda.is_available():
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device())


def _configs(*sizes: Any) -> list[dict[str, Any]]:
    configs = importlib.import_module("fastllm.kernels.matmul_configs").configs
    *_, dtype, products, _, _ = sizes
    found = configs(dtype, _tiles().capability(_here()), products)
    return [dataclasses.asdict(c) for c in found]


def _default(m: int, k: int, n: int, a_along: bool, b_along: bool, *more: Any) -> dict[str, Any]:
    return dataclasses.asdict(_matmul().heuristic(_here(), m, k, n, *more))


def _operands(
    device: torch.device,
    m: int,
    k: int,
    n: int,
    a_along: bool,
    b_along: bool,
    dtype: torch.dtype,
    products: int,
    plain: bool,
    tf32: bool,
) -> tuple:
    """a, b (and b2) in the layouts that are asked for, and whether there is an epilogue."""

    def operand(rows: int, columns: int, along: bool) -> Tensor:
        made = torch.randn((rows, columns) if along else (columns, rows), device=device).to(dtype)
        return made if along else made.t()

    rights = [operand(n, k, b_along).t() for _ in range(products)]
    return (operand(m, k, a_along), *rights, plain, tf32)


def _run(config: dict[str, Any], a: Tensor, *rest: Any) -> Any:
    *rights, plain, tf32 = rest
    chosen = _tiles().Config(**config)
    if len(rights) == 2:
        return _matmul().gated_matmul(a, *rights, tf32=tf32, config=chosen)
    activation = None if plain else "gelu"
    return _matmul().matmul(a, *rights, activation=activation, tf32=tf32, config=chosen)


TILES = Tunable(
    "matmul.triton",
    "matmul",
    configs=_configs,
    default=_default,
    build=_operands,
    run=_run,
    samples=[  # a layer's Y, dX and dW, a token's Y, and the gated pair
        (*sizes, dtype, products, plain, False)
        for dtype in (torch.bfloat16, torch.float16)
        for inner, outer in ((768, 3072), (1024, 1024), (4096, 4096))
        for sizes, products, plain in (
            ((1, inner, outer, True, True), 1, True),
            ((2048, inner, outer, True, True), 1, True),
            ((2048, inner, outer, True, True), 1, False),
            ((2048, inner, outer, True, True), 2, False),
            ((2048, outer, inner, True, False), 1, True),
            ((outer, 2048, inner, False, False), 1, True),
        )
    ],
    kind="cuda",
)
