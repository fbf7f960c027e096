"""rotary_embedding and rotary_embedding_: query and key rotated by their positions."""

from typing import Any

import torch
from torch import Tensor

from fastllm.core.dispatch import define
from fastllm.core.op import describe
from fastllm.ops.rotary import cpu, reference, spec, stock, triton
from fastllm.ops.rotary.cases import cases


def _saved(args: tuple, outputs: Any) -> tuple:
    """The tables, and how large query and key were: they themselves need not be kept."""
    query, key, cos, sin, rotary_dim, interleaved = args
    return cos, sin, tuple(query.shape), tuple(key.shape), query.dtype, rotary_dim, interleaved


def _forward_args(saved: tuple) -> tuple:
    """What supports() looks at: the tables stand for query and key, on the same device."""
    return (saved[0], saved[0], saved[0], saved[1], *saved[5:])


rotary_op = define(
    "rotary_embedding",
    (cpu.BACKEND, triton.BACKEND, stock.BACKEND),
    reference,
    family="rotary",
    schema=spec.SCHEMA,
    tensors=(0, 1, 2, 3),
    saved=_saved,
    saved_tensors=(0, 1),
    gradients={0: 0, 1: 1},
    outputs=2,
    forward_args=_forward_args,
    check=spec.check,
    fake=spec.fake,
    fake_backward=spec.fake_backward,
    cost=spec.cost,
    cases=cases(),
)


def rotary_embedding(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    rotary_dim: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (Su et al. 2021) of query and key: x cos + partner(x) sin.

    query         [B, H, T, D], any strides (a transposed [B, T, H, D] is read where it is)
    key           [B, G, T, D], of query's dtype
    cos, sin      [T, R] or [B, T, R]: as transformers makes them, both halves filled. The first R
                  columns are rotated, the others passed through. They may be float32.
    interleaved   pairs are (2i, 2i + 1), as in the paper, not (i, i + R/2), as in transformers
    position_ids  [T] or [B, T]: which rows of cos and sin, [S, R], belong to the tokens
    rotary_dim    R, where cos and sin have only R/2 columns, one a pair
    backend       forces one of fastllm's backends for this call

    Returns both, rotated, contiguous, in query's dtype. The gradient is the opposite rotation; it
    reaches cos and sin, too, where they require one. Raises TypeError or ValueError for arguments
    that do not fit, IndexError for a position that cos does not have, fastllm.UnsupportedError when
    `backend` cannot serve the call.
    """
    args = _resolve(query, key, cos, sin, interleaved, position_ids, rotary_dim)
    if torch.is_grad_enabled() and (args[2].requires_grad or args[3].requires_grad):
        return rotary_op.composite(args, backend)
    return rotary_op(*args, backend=backend)


def rotary_embedding_(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`rotary_embedding` in place: overwrites query and key, and returns them.

    autograd knows of the write: it bumps their versions. Arguments and errors as above; ValueError
    where elements of query or key share memory, RuntimeError (torch's) for a leaf that requires a
    gradient.
    """
    args = _resolve(query, key, cos, sin, interleaved, position_ids, rotary_dim)
    rotary_op.check(*args)
    for name, tensor in (("query", query), ("key", key)):
        if any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise ValueError(
                f"{name}: expected memory of its own for each element, found an expanded "
                f"tensor {describe(tensor)}"
            )
    plain = not torch.compiler.is_compiling() and type(query) is type(key) is Tensor
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in args[:4])
    if plain and not graph and not torch._C._len_torch_dispatch_stack():
        run = {"cpu": cpu, "triton": triton}.get(rotary_op.select(args).name)
        if run is not None and query.stride(-1) == key.stride(-1) == 1:
            table = args[2].contiguous(), args[3].contiguous()
            for x in (query, key):
                run.rotate(x, x, *table, args[4], interleaved, False)
            torch.autograd.graph.increment_version([query, key])
            return query, key
    rotated = rotary_embedding(
        query, key, args[2], args[3], interleaved=interleaved, rotary_dim=args[4]
    )
    return query.copy_(rotated[0]), key.copy_(rotated[1])


def _resolve(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    position_ids: Tensor | None,
    rotary_dim: int | None,
) -> tuple:
    """The op's arguments: rows of the tables picked, their width settled."""
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name}: expected a Tensor, found {type(table).__name__}")
    if position_ids is not None:
        if cos.dim() != 2 or position_ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "position_ids: expected int32 or int64 with cos and sin [S, R], found "
                f"{describe(position_ids)} with {describe(cos)}"
            )
        cos, sin = cos[position_ids], sin[position_ids]
    return query, key, cos, sin, rotary_dim or cos.shape[-1], interleaved
