"""SparseLinear and Int8TrainingLinear for the bench, against the dense nn.Linear they replace."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.instances import assign
from fastllm.core.proof import relative_error
from fastllm.core.subject import Scenario, Subject, Trial, register
from fastllm.quant.int8_training import GRADIENTS, Int8TrainingLinear
from fastllm.quant.sparse import SparseLinear

Make = Callable[[nn.Linear], nn.Linear]
FORWARD, TRAINING = "forward", "forward+backward"
CACHE = 256 << 20  # bytes that outgrow it
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

# (tokens, in_features, out_features)
SPARSE = tuple((tokens, 4096, 4096) for tokens in (1, 4, 8, 16, 64))
TRAINED = ((256, 1024, 1024), (512, 1024, 1024), (512, 4096, 4096), (2048, 1024, 4096))


def dense(k: int, n: int, dtype: torch.dtype, device: str) -> nn.Linear:
    """A layer whose weight is 2:4, so that every candidate computes the same."""
    layer = nn.Linear(k, n, bias=False, device=device)
    with torch.no_grad():
        fours = layer.weight.view(n, k // 4, 4)
        low = fours.abs().argsort(-1)[..., :2]
        fours.scatter_(-1, low, 0.0)
    return layer.to(dtype)


def sparse(layer: nn.Linear) -> nn.Linear:
    """It with half of its weights."""
    return SparseLinear.from_dense(layer)


def trained(layer: nn.Linear) -> nn.Linear:
    """It as prepare_int8_training makes it."""
    layer.grad_weight = GRADIENTS[0]  # type: ignore[assignment]
    assign(layer, Int8TrainingLinear)
    return layer


def _calls(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    make: Make,
    sets: int,
    device: str,
    direction: str,
) -> Callable[[int], Any]:
    tokens, k, n = shape
    first = make(dense(k, n, dtype, device))
    layers = [first, *(copy.deepcopy(first) for _ in range(sets - 1))]
    x = torch.randn(tokens, k, device=device).to(dtype)
    upstream = torch.randn(tokens, n, device=device).to(dtype)

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return layers[i % sets](x)

    def training(i: int) -> Any:
        layer = layers[i % sets]
        return torch.autograd.grad(layer(x), (x, *layer.parameters()), upstream)

    if direction == FORWARD:
        return forward
    x.requires_grad_()
    return training


def _trial(
    shape: tuple[int, int, int], dtype: torch.dtype, make: Make, share: float,
    device: str, direction: str,
) -> Trial:  # fmt: skip
    tokens, k, n = shape
    whole = k * n * dtype.itemsize
    sets = min(32, 1 + CACHE // whole)
    passes = 1 if direction == FORWARD else 3
    same = partial(_calls, shape, dtype, sets=sets, device=device, direction=direction)
    return Trial(
        ours=partial(same, make=make),
        stock={"eager": partial(same, make=lambda layer: layer)},
        nbytes=passes * (int(share * whole) + tokens * (k + n) * dtype.itemsize),
        flops=int(passes * 2 * share * tokens * n * k),
        sets=sets,
        cold=True,
        backend="cpu" if device == "cpu" else "triton",
    )


def _wrong(shape: tuple[int, int, int], dtype: torch.dtype, make: Make, device: str) -> str | None:
    """Whether a layer made from the dense one computes what that does, to int8's exactness."""
    k, n = (min(512, size) for size in shape[1:])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, k, generator=generator).to(device, dtype)
    layer = dense(k, n, dtype, device)
    with torch.no_grad():
        wanted = layer(x).double()
        error = relative_error(make(copy.deepcopy(layer))(x).double(), wanted)
    return None if error < 0.03 else f"its outputs are {error:.2g} off the dense layer's"


def _register(
    name: str, family: str, shapes: Any, dtypes: Any, make: Make, share: float, directions: Any
) -> None:
    scenarios = [
        Scenario(
            f"{'x'.join(map(str, shape))}-{NAMES[dtype]}",
            dtype,
            shape[1] * shape[2] * dtype.itemsize + shape[0] * shape[1] * shape[2] // 50,
            partial(_trial, shape, dtype, make, share),
            partial(_wrong, shape, dtype, make),
        )
        for dtype in dtypes
        for shape in shapes
    ]
    register(Subject(name, family, scenarios, directions, quick=directions[-1:]))


_register("linear_2to4", "sparse_linear", SPARSE, tuple(NAMES), sparse, 0.5, (FORWARD,))
_register(
    "linear_int8_training", "quant_linear", TRAINED, (torch.float32,), trained, 1.0,
    (FORWARD, TRAINING),
)  # fmt: skip
