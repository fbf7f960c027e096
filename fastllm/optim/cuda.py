"""The multi-tensor step in CUDA C++ (csrc/cuda/optim.cuh): on the device, without a sync."""

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm import _C
from fastllm.ops.norm.cuda import available as available  # the same extension and chips
from fastllm.optim import cpu
from fastllm.optim.work import Work

try:
    from fastllm import _cuda  # type: ignore[attr-defined]
except ImportError:
    _cuda = None

KINDS = {"cuda": 2}  # device types, and DLPack's numbers for them
PIECE = 16384  # elements of a block of threads
GROUPS = 32  # whose settings go with one launch
ALONG = 3  # csrc/cuda/optim_params.h
# int64 fields of a row, bytes of its use; places in a row
_ROW, _USE, _SCALE, _N, _GROUP = 14, 64, 6, 9, 12
_KEPT = 64  # tables at most
_tables: dict[Any, "Table"] = {}


class Table:
    """Tensors' addresses and the blocks' shares of them, in device memory, and room to work in."""

    def __init__(self, rows: bytes, device: torch.device) -> None:
        lines = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, _ROW)
        shares, self.counts = _shares(lines[:, _N].tolist(), lines[:, _GROUP].tolist())
        self.rows, self.count = lines.to(device, non_blocking=True), len(lines)
        flat = torch.tensor(shares, dtype=torch.int64).view(-1, 2)
        self.shares, self.share_count = flat.to(device, non_blocking=True), len(shares)
        self.uses = torch.empty(self.count * _USE, dtype=torch.uint8, device=device)
        self.squares = torch.empty(self.share_count, device=device)


def _shares(sizes: list[int], groups: list[int]) -> tuple[list[tuple[int, int]], bytes]:
    """(row, first element) of each block, and how many rows and blocks each 32 groups have."""
    shares: list[tuple[int, int]] = []
    counts = [[0, 0] for _ in range(max(groups, default=0) // GROUPS + 1)]
    for row, (size, group) in enumerate(zip(sizes, groups, strict=True)):
        mine = [(row, at) for at in range(0, size, PIECE)]
        shares += mine
        counts[group // GROUPS][0] += 1
        counts[group // GROUPS][1] += len(mine)
    return shares, b"".join(struct.pack("2q", *c) for c in counts)


def rows_of(works: list[Work]) -> bytes | str:
    """The works' tensors as the kernels read them, or why they do not."""
    device = works[0].params[0].device
    if device.type not in KINDS:
        return f"a parameter is on {device}"
    found = _read(works, device)
    if isinstance(found, list):
        # rare: other strides than the parameter's
        for work, i in cpu.places(works, found):
            cpu.lay_out(work, i)
        found = _read(works, device)
    if isinstance(found, bytes):
        return found
    return f"{len(found)} tensors are on other devices, of other dtypes or lie with gaps"


def _read(works: list[Work], device: torch.device) -> bytes | list[int]:
    made: Any = _C.optim_rows(
        list(map(cpu.arguments, works)), KINDS[device.type], device.index or 0
    )
    return made


def run(
    kind: int, works: list[Work], rows: bytes, rates: Sequence[Tensor | None],
    scale: Tensor | None, found: Tensor | None, max_norm: float | None,
) -> Tensor | None:  # fmt: skip
    """Updates everything; returns the norm of the gradients where there is one to clip to.

    rates   for each work its learning rate on the device, or None: the settings' own. The settings'
            factor is 1, or -1 to maximize: loss scale and clipping are worked out on the device.
    """
    device = works[0].params[0].device
    table = _tables.get((rows, device))
    if table is None:
        if len(_tables) >= _KEPT:
            _tables.clear()
        table = _tables[rows, device] = Table(rows, device)
    scale, found = _on(device, scale), _on(device, found)
    norm = None if max_norm is None else torch.zeros((), device=device)
    settings = b"".join(map(_packed, works, rates))
    _cuda.optim_step(
        kind, table.rows.data_ptr(), table.shares.data_ptr(), table.count, table.share_count,
        table.uses.data_ptr(), 0 if norm is None else table.squares.data_ptr(), _address(scale),
        _address(found), _address(norm), max_norm or 0.0, settings, table.counts,
        device.index or 0, stream_of(device),
    )  # fmt: skip
    torch.autograd.graph.increment_version([p for work in works for p in work.params])
    return norm


def run_works(
    kind: int, works: list[Work], scale: Tensor | None, found: Tensor | None,
    max_norm: float | None,
) -> Tensor | None:  # fmt: skip
    """The same, for works that are known to be readable."""
    return run(kind, works, _rows_of(works), [None] * len(works), scale, found, max_norm)


def run_along(works: list[Work], sizes: list[Tensor], found: Tensor | None) -> None:
    """p <- p - lr size grad: the second update of a step, with sizes of each work's tensors."""
    lines = torch.frombuffer(bytearray(_rows_of(works)), dtype=torch.int64).view(-1, _ROW)
    places = [size.data_ptr() + 4 * i for size in sizes for i in range(len(size))]
    lines[:, _SCALE] = torch.tensor(places, dtype=torch.int64)
    run(ALONG, works, lines.numpy().tobytes(), [None] * len(works), None, found, None)


def _rows_of(works: list[Work]) -> bytes:
    rows = rows_of(works)
    if isinstance(rows, str):
        raise RuntimeError(f"tensors changed during an optimizer's step: {rows}")
    return rows


def _packed(work: Work, rate: Tensor | None) -> bytes:
    """OptimSettings of csrc/cuda/optim_params.h."""
    s = work.settings
    return struct.pack(
        "5dQfI3?5x", s.lr, s.one, s.two, s.eps, s.weight_decay, _address(rate), s.factor,
        s.seed & 0xFFFFFFFF, s.decoupled, s.nesterov, s.stochastic,
    )  # fmt: skip


def _on(device: torch.device, value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value).to(device, torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(device: torch.device) -> int:
    """The current stream; memory of a table that is dropped is used again on it only."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
