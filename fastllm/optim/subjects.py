"""Optimizer steps for the bench: cases tagged "bench" against torch's default and fused ones."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastllm.core.backend import backend
from fastllm.core.proof import compare
from fastllm.core.subject import Scenario, Subject, Trial, register
from fastllm.optim.cases import CASES, Case

CACHES = 256 << 20  # bytes: more than this does not stay in any cache
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.03125, "fp8": 1.03125}  # of a state's element
PROOF = ((64, 96), (33, 131))
Make = Callable[[list[Parameter]], torch.optim.Optimizer]


def _makers(case: Case) -> dict[str, Make]:
    """Ours, and torch's as its constructor has it and at its fastest."""
    assert case.stock is not None
    plain = {name: value for name, value in case.options.items() if name != "fused"}
    return {
        "ours": partial(case.make, **plain, **case.extra),
        "eager": partial(case.stock, **plain),
        "fused": partial(case.stock, **plain, fused=True),
    }


def _moved(case: Case) -> int:
    """Bytes: parameters and states are read and written, gradients read."""
    elements = sum(math.prod(shape) for shape in case.shapes)
    states = 1 if case.name.startswith("SGD") else 2
    kept = BYTES[case.extra.get("state_dtype", "fp32")]
    return int(elements * (3 * case.dtype.itemsize + 2 * states * kept))


def _step(make: Make, case: Case, device: str) -> Callable[[int], Any]:
    params = case.params()
    for p in params:
        grad, p.grad = p.grad, None
        p.data = p.data.to(device)
        p.grad = None if grad is None else grad.to(device)
    optimizer = make(params)
    return lambda i: optimizer.step()


def _trial(case: Case, device: str, direction: str) -> Trial:
    ours, *stock = _makers(case).items()
    nbytes = _moved(case)
    return Trial(
        ours=partial(_step, ours[1], case, device),
        stock={name: partial(_step, make, case, device) for name, make in stock},
        nbytes=nbytes,
        cold=nbytes > CACHES,
        backend="cpu" if device == "cpu" else "torch",
    )


def _after(make: Make, case: Case, dtype: torch.dtype, steps: int = 3) -> list[Tensor]:
    """Parameters after some steps from the same start, with gradients that change."""
    params = [Parameter(p.detach().to(dtype)) for p in case.params()]
    optimizer = make(params)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(case.dtype).to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def _wrong(case: Case, device: str) -> str | None:
    """Whether a small run is at most twice as far from float64 as torch's, or, where states are
    rounded at random, as the plain form of the same rounding."""
    small = replace(case, shapes=PROOF)
    make = _makers(small)
    ours = _after(make["ours"], small, case.dtype)
    if case.extra:
        with backend("reference"):
            plain = _after(make["ours"], small, case.dtype)
        start = [p.detach() for p in small.params()]
        for a, b, c in zip(ours, plain, start, strict=True):
            if not (a - b).abs().mean() <= 1e-2 * (b - c).abs().mean():
                return f"{case.name}: more than 1% of a step away from the plain form"
        return None
    stock = _after(make["eager"], small, case.dtype)
    exact = _after(make["eager"], small, torch.float64)
    for i, (a, b, c) in enumerate(zip(ours, stock, exact, strict=True)):
        proof = compare(f"{case.name}, parameter {i}", a, b, c)
        if not proof.ok:
            return proof.message
    return None


for _name in dict.fromkeys(case.make.__name__ for case in CASES):
    _scenarios = [
        Scenario(
            case.name.split("-", 1)[1],
            case.dtype,
            _moved(case),
            partial(_trial, case),
            partial(_wrong, case),
        )
        for case in CASES
        if "bench" in case.tags and case.make.__name__ == _name and case.stock
    ]
    if _scenarios:
        register(Subject(_name, "optim", _scenarios))
