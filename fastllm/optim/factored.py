"""Adafactor's directions on a device, waiting for nothing: in Triton, or in CUDA C++ for all
tensors of a group at once (csrc/cuda/adafactor.cuh)."""

import importlib
import struct
from typing import Any

import torch
from torch import Tensor

from fastllm.optim import cuda
from fastllm.optim.directed import computed
from fastllm.optim.work import Work

MOMENTS = ("row_var", "col_var", "variance")
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PARTS, _LEAST_ROWS, _COLUMNS = 256, 16, 256  # shares of a matrix at most, rows of one, a block's
_KEPT = 64  # tables at most
_tables: dict[Any, "Table"] = {}


def begin(state: dict[str, Any], p: Tensor) -> None:
    """The moments of a parameter before its first step."""
    if p.dim() < 2:
        state["variance"] = torch.zeros_like(p, dtype=computed(p))
        return
    one = torch.zeros((), dtype=computed(p), device=p.device)
    state["row_var"] = one.new_zeros((*p.shape[:-1], 1))
    state["col_var"] = one.new_zeros((*p.shape[:-2], 1, p.shape[-1]))


def ways_there(
    work: Work, lengths: list[Tensor], factor: Tensor, found: Tensor | None, kernels: Any
) -> tuple[list[Tensor], Tensor]:
    """(directions, how far along each) of a group's tensors; their moments are brought up to date.

    lengths are the parameters' norms; factor and found are float32 scalars on the device.
    """
    for own, p in zip(work.own, work.params, strict=True):
        if not own.keys() & set(MOMENTS):
            begin(own, p)
    if kernels is cuda:
        return _at_once(work, torch.stack(lengths), factor, found)
    made = [_in_triton(work, i, n, factor, found) for i, n in enumerate(lengths)]
    return [u for u, _ in made], torch.stack([size for _, size in made])


def _floor(work: Work, p: Tensor) -> float:
    s: Any = work.settings
    return torch.finfo(p.dtype).eps if s.floor is None else s.floor


def _in_triton(
    work: Work, i: int, length: Tensor, factor: Tensor, found: Tensor | None
) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("fastllm.kernels.adafactor")
    s: Any = work.settings
    state, grad, p = work.own[i], work.grads[i], work.params[i]
    assert work.steps is not None
    time, many = work.steps[i].float().clamp(min=1.0), max(p.numel(), 1)
    mix, floor = time**s.beta2_decay, _floor(work, p)
    factor = factor * s.factor

    def blend(old: Tensor, new: Tensor) -> Tensor:
        new = torch.lerp(old, new, mix)
        return old.copy_(new if found is None else torch.where(found != 0, old, new))

    if p.dim() < 2:
        g = grad.float() * factor
        u = g * blend(state["variance"], g * g).clamp(min=floor * floor).rsqrt_()
        squares = u.square().sum()
    else:
        g, (rows, cols) = grad.contiguous(), grad.shape[-2:]
        by_row, by_col = kernels.squares(g)
        row = blend(state["row_var"], by_row * (factor**2 / max(cols, 1)))
        col = blend(state["col_var"], by_col * (factor**2 / max(rows, 1)))
        row = row / row.mean(-2, keepdim=True).clamp_(min=floor)
        u, squares = kernels.direction(g, row, col, factor, floor * floor)
    far = (length / many**0.5).clamp(min=s.least) * (time**-0.5).clamp(max=s.lr)
    return u, far / ((squares / many).sqrt() / s.d).clamp(min=1.0)


class Table:
    """FactorRow and FactorShare of csrc/cuda/adafactor.h, in device memory."""

    def __init__(self, work: Work, grads: list[Tensor]) -> None:
        rows: list[bytes] = []
        shares: list[tuple[int, ...]] = []
        moments: list[tuple[int, ...]] = []
        room = out = 0
        self.outs: list[int] = []
        assert work.steps is not None
        for i, (p, g, own) in enumerate(zip(work.params, grads, work.own, strict=True)):
            n, first, matrix = p.numel(), len(shares), p.dim() >= 2
            height, width = p.shape[-2:] if matrix else (1, max(n, 1))
            step = max(_LEAST_ROWS, -(-height // _PARTS)) if matrix else cuda.PIECE
            length = height if matrix else n
            mine = [(at, min(length, at + step)) for at in range(0, length, step)] if n else []
            matrices = n // (height * width) if n else 0
            for m in range(matrices):
                shares += [(i, m, k, *where) for k, where in enumerate(mine)]
                if matrix:
                    moments.append((i, m, 0, 0, -1))
                    moments += [
                        (i, m, 0, c, min(width, c + _COLUMNS)) for c in range(0, width, _COLUMNS)
                    ]
            by_col = room + (matrices * height if matrix else 0)
            state = (own["row_var"], own["col_var"]) if matrix else (own["variance"], None)
            rows.append(struct.pack(
                "14qd", g.data_ptr(), state[0].data_ptr(),
                0 if state[1] is None else state[1].data_ptr(), work.steps[i].data_ptr(),
                _CODES[g.dtype], n, height, width, len(mine), room, by_col, out, first,
                len(shares) - first, _floor(work, p),
            ))  # fmt: skip
            room = by_col + (matrices * len(mine) * width if matrix else 0)
            self.outs.append(out)
            out += n
        device = work.params[0].device
        lines = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.int64)
        self.rows = lines.to(device, non_blocking=True)
        self.shares, self.moments = (
            torch.tensor(lists, dtype=torch.int64).view(-1, 5).to(device, non_blocking=True)
            for lists in (shares, moments)
        )
        self.room, self.size = room, out


def _at_once(
    work: Work, lengths: Tensor, factor: Tensor, found: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    s: Any = work.settings
    grads = [g.contiguous() for g in work.grads]
    for own in work.own:
        for name in own.keys() & set(MOMENTS):
            own[name] = own[name].contiguous()
    table = _table_of(work, grads)
    device = lengths.device
    room, out, sums, sizes = (
        torch.empty(n, device=device)
        for n in (table.room, table.size, len(table.shares), len(grads))
    )
    cuda._cuda.adafactor(
        table.rows.data_ptr(), table.shares.data_ptr(), table.moments.data_ptr(), len(grads),
        len(table.shares), len(table.moments), lengths.data_ptr(), factor.data_ptr(),
        0 if found is None else found.data_ptr(), room.data_ptr(), out.data_ptr(),
        sums.data_ptr(), sizes.data_ptr(), s.lr, s.beta2_decay, s.least, s.d, s.factor,
        device.index or 0, cuda.stream_of(device),
    )  # fmt: skip
    found_out = zip(table.outs, grads, strict=True)
    return [out[at : at + g.numel()].view(g.shape) for at, g in found_out], sizes


def _table_of(work: Work, grads: list[Tensor]) -> Table:
    """The table of these tensors; kept by their addresses, shapes and dtypes."""
    assert work.steps is not None
    kept = [sorted(own.keys() & set(MOMENTS)) for own in work.own]
    name = grads[0].device, tuple(
        (g.data_ptr(), g.dtype, p.dtype, p.shape, step.data_ptr(), _floor(work, p),
         *(own[n].data_ptr() for n in names))
        for g, p, step, own, names in zip(
            grads, work.params, work.steps, work.own, kept, strict=True
        )
    )  # fmt: skip
    table = _tables.get(name)
    if table is None:
        if len(_tables) >= _KEPT:
            _tables.clear()
        table = _tables[name] = Table(work, grads)
    return table
