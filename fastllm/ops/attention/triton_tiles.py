"""Block shapes of the Triton attention, measured where somebody tuned, else the heuristic's.

Sizes: query heads of the batch, query heads to a key head, T, S, D, Dv, dtype, whether the mask is
causal, whether scores are more than products (a mask, softcap, slopes, dropout, packed sequences).
"""

import importlib
from typing import Any

import torch
from torch import Tensor

from fastllm.core.tuner.tunable import Tunable

Config = dict[str, Any]


def _module(name: str) -> Any:
    return importlib.import_module(f"fastllm.kernels.{name}")


def forward_config(shape: Any, options: Any) -> Config:
    """The config of a forward call (attention_scores.py: Shape, Options)."""
    if not shape.q.is_cuda:  # meta tensors and Triton's interpreter: nothing is measured there
        return _module("attention_configs").forward_config(shape, options)
    return FORWARD(shape.q.device, *_sizes(shape, options))


def backward_config(shape: Any, options: Any) -> Config:
    """The config of a backward call; dQ by atomics only where results may differ between runs."""
    if not shape.q.is_cuda:
        return _module("attention_configs").backward_config(shape, options)
    found = BACKWARD(shape.q.device, *_sizes(shape, options))
    fixed = torch.are_deterministic_algorithms_enabled()
    return {**found, "atomic": False} if fixed else found


def _sizes(x: Any, options: Any) -> tuple[Any, ...]:
    extra = _module("attention_configs").more_than_products(x, options)
    return (
        x.batch * x.heads, x.heads // x.groups, x.t, x.s, x.d, x.dv, x.q.dtype, options.right == 0,
        extra,
    )  # fmt: skip


def _chip() -> Any:
    """The capability of the GPU that is current; without one, an H100's."""
    if not torch.cuda.is_available():
        return (9, 0)
    return _module("tiles").capability(torch.device("cuda", torch.cuda.current_device()))


def _forward_configs(*sizes: Any) -> list[Config]:
    _, _, t, _, d, dv, dtype, _, _ = sizes
    return _module("attention_configs").forward_configs(_chip(), dtype, d, dv, t)


def _backward_configs(*sizes: Any) -> list[Config]:
    d, dv, dtype = sizes[4:7]
    return _module("attention_configs").backward_configs(_chip(), dtype, d, dv)


def _forward_default(*sizes: Any) -> Config:
    _, _, t, _, d, dv, dtype, _, extra = sizes
    return _module("attention_configs").forward_default(_chip(), dtype, max(d, dv), t, extra)


def _backward_default(*sizes: Any) -> Config:
    _, _, _, _, d, dv, dtype, _, extra = sizes
    return _module("attention_configs").backward_default(_chip(), dtype, max(d, dv), extra)


def _call(q: Tensor, k: Tensor, v: Tensor, causal: bool, extra: bool) -> tuple[Any, Any]:
    """Shape and Options; softcap stands for all that makes scores more than products."""
    scores = _module("attention_scores")
    shape = scores.Shape(q, k, v)
    numbers = (q.shape[3] ** -0.5, -1, 0 if causal else -1, 0, 30.0 if extra else 0.0)
    return shape, scores.Options(*numbers)


def _inputs(
    device: torch.device,
    heads: int,
    group: int,
    t: int,
    s: int,
    d: int,
    dv: int,
    dtype: torch.dtype,
    causal: bool,
    extra: bool,
) -> tuple:
    groups = max(1, heads // group)
    sizes = ((groups * group, t, d), (groups, s, d), (groups, s, dv))
    made = [torch.randn(1, *size, device=device).to(dtype) for size in sizes]
    return (*made, causal, extra)


def _forward(config: Config, *args: Any) -> Any:
    return _module("attention").attention_fwd(*_call(*args), config)


def _backward_inputs(device: torch.device, *sizes: Any) -> tuple:
    args = _inputs(device, *sizes)
    out, lse = _forward(_forward_default(*sizes), *args)
    return (torch.randn_like(out), out, lse, *args)


def _backward(config: Config, dout: Tensor, out: Tensor, lse: Tensor, *args: Any) -> Any:
    needs = (True, True, True, False, False)
    bwd = _module("attention_backward").attention_bwd
    return bwd(dout, None, *_call(*args), out, lse, needs, config)


SAMPLES = [  # language models, an encoder, and few queries
    (heads, group, t, t, d, d, dtype, causal, False)
    for dtype in (torch.bfloat16, torch.float16)
    for heads, group, t, d, causal in (
        (32, 4, 2048, 128, True),
        (32, 4, 8192, 128, True),
        (32, 1, 1024, 64, True),
        (96, 1, 512, 64, False),
        (32, 4, 16, 128, True),
    )
]
FORWARD = Tunable(
    "attention.triton",
    "attention",
    configs=_forward_configs,
    default=_forward_default,
    build=_inputs,
    run=_forward,
    samples=SAMPLES,
    kind="cuda",
)
BACKWARD = Tunable(
    "attention_backward.triton",
    "attention",
    configs=_backward_configs,
    default=_backward_default,
    build=_backward_inputs,
    run=_backward,
    samples=SAMPLES,
    kind="cuda",
)
