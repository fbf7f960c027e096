"""What of the modules' calls has no stock op to stand beside, for the bench."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.core.measure import Factory, copies, rotation, size_of
from fastllm.core.op import OPS
from fastllm.core.proof import prove
from fastllm.core.subject import Scenario, Subject, Trial, register
from fastllm.ops.dropout import dropout_add

P = 0.1
SIZES = ((64, 512), (2048, 512), (4096, 4096))  # 2048 tokens of a small model's hidden states
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

Add = Callable[[Tensor, Tensor], Tensor]


def _ours(input: Tensor, residual: Tensor) -> Tensor:
    return dropout_add(input, residual, P)


def _stock(input: Tensor, residual: Tensor) -> Tensor:
    return F.dropout(input, P) + residual


def _dropout_add(shape: tuple[int, int], dtype: torch.dtype, device: str, direction: str) -> Trial:
    training = direction != "forward"
    made = tuple(torch.randn(shape, device=device).to(dtype) for _ in range(3))
    sets = rotation(size_of(made), device)
    inputs = copies(made, sets)
    for *leaves, _ in inputs:
        for leaf in leaves:
            leaf.requires_grad_(training)

    def timed(add: Add) -> Factory:
        def call(i: int) -> Any:
            x, y, upstream = inputs[i]
            out = add(x, y)
            return torch.autograd.grad(out, (x, y), upstream) if training else out

        return lambda: call

    def compiled() -> Callable[[int], Any]:
        torch._dynamo.reset()
        return timed(torch.compile(_stock, dynamic=False, fullgraph=True))()

    moved = made[0].nbytes * (5 if training else 3)  # backward reads one gradient and writes one
    return Trial(
        ours=timed(_ours),
        stock={"eager": timed(_stock)},
        nbytes=moved,
        compiled={"compiled": compiled},
        sets=sets,
        backend=OPS["dropout_add"].select((made[0], made[1], torch.zeros(1).long(), P)).name,
    )


def _proven(dtype: torch.dtype, device: str) -> str | None:
    """The first quick case of this dtype that fails, in words: stock draws another mask."""
    op = OPS["dropout_add"]
    for case in op.cases:
        if case.dtype == dtype and "quick" in case.tags:
            proof = prove(op, case, device=device)
            if not proof.ok:
                return proof.message
    return None


def _scenario(shape: tuple[int, int], dtype: torch.dtype) -> Scenario:
    name = f"{shape[0]}x{shape[1]}-{NAMES[dtype]}-p{P:g}"
    size = shape[0] * shape[1] * dtype.itemsize * 3

    def trial(device: str, direction: str) -> Trial:
        return _dropout_add(shape, dtype, device, direction)

    return Scenario(name, dtype, size, trial, lambda device: _proven(dtype, device))


register(
    Subject(
        "dropout_add",
        "dropout",
        [_scenario(shape, dtype) for dtype in NAMES for shape in SIZES],
        ("forward", "forward+backward"),
    )
)
