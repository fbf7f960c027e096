"""An optimizer's step for many tensors in one launch, and the norm of their gradients in another.

A table holds the addresses of each tensor's memory, a list says which piece of which tensor a
program has. What is known on the device only (loss scale, inf found, clipping, bias correction) is
read there: nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.device import on
from fastllm.kernels.optim_codes import (
    half_from,
    half_to,
    load_codes,
    mixed,
    store_codes,
)

CHUNK = 16384  # elements of a program
_BLOCK, _WARPS = 1024, 4
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# of the table: parameter, gradient, master copy, three states, scales of two, number of elements
COLUMNS = 9
ADAM, SGD, LION = 0, 1, 2


@triton.jit
def _address(table_ptr, row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(table_ptr + row * 9 + COLUMN).to(tl.pointer_type(TYPE), bitcast=False)
    return tl.multiple_of(ptr, 16) if ALIGNED else ptr


@triton.jit
def _read(ptr, at, mask):
    none: tl.constexpr = None if mask is None else 0.0
    return tl.load(ptr + at, mask=mask, other=none).to(tl.float32)


@triton.jit
def _share(n, first, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    # A program's elements, and how many of them are in whole blocks: those need no mask.
    mine = tl.minimum(tl.maximum(n - first, 0), CHUNK).to(tl.int32)
    return mine, mine // BLOCK * BLOCK


@triton.jit
def _adam(p, g, m, v, most, step, root, one, two, eps, decay, MAX: tl.constexpr):
    m += (g - m) * (1.0 - one)
    v = v * two + g * g * (1.0 - two)
    top = v
    if MAX:
        # NaN goes on
        top = tl.where(v < most, most, v)
    size = tl.sqrt_rn(top) * root + eps
    return p * decay - step * tl.div_rn(m, size), m, v, top


@triton.jit
def _get(ptr, scale_ptr, at, mask, STORE: tl.constexpr):
    # A state as numbers, however it is kept.
    if STORE == 0:
        return _read(ptr, at, mask)
    elif STORE == 1:
        return half_from(ptr, at, mask)
    else:
        return load_codes(ptr, scale_ptr, at, mask, STORE)


@triton.jit
def _put(ptr, scale_ptr, at, mask, x, n, key, half_key, STORE: tl.constexpr, BLOCK: tl.constexpr):
    if STORE == 0:
        tl.store(ptr + at, x, mask=mask)
    elif STORE == 1:
        half_to(ptr, at, mask, x, half_key)
    else:
        store_codes(ptr, scale_ptr, at, mask, x, n, key, STORE, BLOCK)


@triton.jit
def _update(
    param_ptr, grad_ptr, master_ptr, a_ptr, b_ptr, c_ptr, as_ptr, bs_ptr, at, mask, n, factor, step,
    root, key, lr, one, two, eps, decay, l2,
    KIND: tl.constexpr, NESTEROV: tl.constexpr, MASTER: tl.constexpr, STATES: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Elements `at` of one tensor; mask None: all of them are there.
    g = _read(grad_ptr, at, mask) * factor
    if STOCHASTIC:
        p = half_from(param_ptr, at, mask)
    else:
        p = _read(master_ptr if MASTER else param_ptr, at, mask)
    g += l2 * p
    if KIND == 0:
        m, v = _get(a_ptr, as_ptr, at, mask, A), _get(b_ptr, bs_ptr, at, mask, B)
        most = _get(c_ptr, bs_ptr, at, mask, C) if STATES > 2 else v
        p, m, v, most = _adam(p, g, m, v, most, lr * step, root, one, two, eps, decay, STATES > 2)
        _put(a_ptr, as_ptr, at, mask, m, n, key, key, A, BLOCK)
        _put(b_ptr, bs_ptr, at, mask, v, n, key, key + 1, B, BLOCK)
        if STATES > 2:
            _put(c_ptr, bs_ptr, at, mask, most, n, key, key + 2, C, BLOCK)
    elif KIND == 1:
        if STATES > 0:
            # step is how much of the gradient enters
            buffer = one * _get(a_ptr, as_ptr, at, mask, A) + step * g
            _put(a_ptr, as_ptr, at, mask, buffer, n, key, key, A, BLOCK)
            g = g + one * buffer if NESTEROV else buffer
            p = p * decay - lr * g
        else:
            # step is the tensor's own factor
            p = p * decay - lr * step * g
    else:
        m = _get(a_ptr, as_ptr, at, mask, A)
        along = m + (g - m) * (1.0 - one)
        sign = tl.where(along > 0.0, 1.0, tl.where(along < 0.0, -1.0, along))
        _put(a_ptr, as_ptr, at, mask, m + (g - m) * (1.0 - two), n, key, key, A, BLOCK)
        p = p * decay - lr * sign
    if MASTER:
        tl.store(master_ptr + at, p, mask=mask)
    if STOCHASTIC:
        half_to(param_ptr, at, mask, p, mixed(key))
    else:
        tl.store(param_ptr + at, p.to(param_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _step_kernel(
    table_ptr, piece_ptr, correction_ptr, key_ptr, factor_ptr, found_ptr,
    lr, one, two, eps, decay, l2,
    KIND: tl.constexpr, NESTEROV: tl.constexpr, MASTER: tl.constexpr, STATES: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, STOCHASTIC: tl.constexpr,
    TA: tl.constexpr, TB: tl.constexpr, TC: tl.constexpr,
    P: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program owns up to CHUNK elements of one tensor.
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(piece_ptr + 2 * pid)
    first = tl.multiple_of(tl.load(piece_ptr + 2 * pid + 1), 16)
    n = tl.load(table_ptr + row * 9 + 8)
    if found_ptr is not None:
        n = tl.where(tl.load(found_ptr) != 0.0, 0, n)
    factor = tl.load(factor_ptr)
    step = tl.load(correction_ptr + 2 * row)
    root = tl.load(correction_ptr + 2 * row + 1)
    key = tl.load(key_ptr + row).to(tl.uint32, bitcast=True)
    param_ptr = _address(table_ptr, row, 0, P, ALIGNED)
    grad_ptr = _address(table_ptr, row, 1, G, ALIGNED)
    master_ptr = _address(table_ptr, row, 2, tl.float32, ALIGNED)
    a_ptr = _address(table_ptr, row, 3, TA, ALIGNED)
    b_ptr = _address(table_ptr, row, 4, TB, ALIGNED)
    c_ptr = _address(table_ptr, row, 5, TC, ALIGNED)
    as_ptr = _address(table_ptr, row, 6, tl.float32, False)
    bs_ptr = _address(table_ptr, row, 7, tl.float32, False)
    mine, whole = _share(n, first, CHUNK, BLOCK)
    for start in range(0, whole, BLOCK):
        start = tl.multiple_of(start, 16)
        _update(
            param_ptr, grad_ptr, master_ptr, a_ptr, b_ptr, c_ptr, as_ptr, bs_ptr,
            first + start + tl.arange(0, BLOCK), None, n, factor, step, root, key,
            lr, one, two, eps, decay, l2, KIND, NESTEROV, MASTER, STATES, A, B, C, STOCHASTIC,
            BLOCK,
        )  # fmt: skip
    if whole < mine:
        at = first + whole + tl.arange(0, BLOCK)
        _update(
            param_ptr, grad_ptr, master_ptr, a_ptr, b_ptr, c_ptr, as_ptr, bs_ptr,
            at, at < n, n, factor, step, root, key,
            lr, one, two, eps, decay, l2, KIND, NESTEROV, MASTER, STATES, A, B, C, STOCHASTIC,
            BLOCK,
        )  # fmt: skip


@triton.jit
def _squares_kernel(
    table_ptr, piece_ptr, out_ptr,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program owns up to CHUNK elements of one gradient and writes the sum of their squares.
    pid = tl.program_id(0).to(tl.int64)
    row = tl.load(piece_ptr + 2 * pid)
    first = tl.multiple_of(tl.load(piece_ptr + 2 * pid + 1), 16)
    n = tl.load(table_ptr + row * 9 + 8)
    grad_ptr = _address(table_ptr, row, 1, G, ALIGNED)
    mine, whole = _share(n, first, CHUNK, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, whole, BLOCK):
        start = tl.multiple_of(start, 16)
        g = _read(grad_ptr, first + start + tl.arange(0, BLOCK), None)
        total += g * g
    if whole < mine:
        at = first + whole + tl.arange(0, BLOCK)
        g = _read(grad_ptr, at, at < n)
        total += g * g
    tl.store(out_ptr + pid, tl.sum(total, axis=0))


class Batch:
    """Tensors of one device and one set of dtypes: their table and pieces, on the device.

    rows     for each tensor (parameter, gradient, master copy or None, states ...), elements in the
             same order in all of them
    stores   how the states are kept: a code of STORES each
    scales   for each tensor those of the first two states, or None
    """

    def __init__(self, rows, addresses, stores):
        self.device = rows[0][0].device
        self.dtypes = rows[0][0].dtype, rows[0][1].dtype
        self.master, self.states = rows[0][2] is not None, len(rows[0]) - 3
        self.stores = [*stores, 0, 0, 0][:3]
        self.sizes = [row[0].numel() for row in rows]
        self.aligned = all(a % 16 == 0 for row in addresses for a in row[:6])
        both = zip(addresses, self.sizes, strict=True)
        flat = [[*a, n] for a, n in both]
        pieces = [(i, at) for i, n in enumerate(self.sizes) for at in range(0, n, CHUNK)]
        self.table = torch.tensor(flat, dtype=torch.int64).to(self.device, non_blocking=True)
        self.pieces = torch.tensor(pieces, dtype=torch.int64).to(self.device, non_blocking=True)
        self.programs = len(pieces)


def addresses_of(rows, scales):
    """What a Batch of these rows depends on: a batch with the same ones may be used again."""
    found = []
    for row, own in zip(rows, scales, strict=True):
        most = [*row, None, None, None][:6] + [*own, None, None][:2]
        found.append([0 if t is None else t.data_ptr() for t in most])
    return found


def squares(batch):
    """The sum of squares of all gradients, a float32 scalar on the device."""
    if not batch.programs:
        return torch.zeros((), device=batch.device)
    out = torch.empty(batch.programs, device=batch.device)
    with on(batch.device):
        _squares_kernel[(batch.programs,)](
            batch.table, batch.pieces, out, _TYPES[batch.dtypes[1]], batch.aligned, CHUNK,
            _BLOCK,
            num_warps=_WARPS,
        )  # fmt: skip
    return out.double().sum().float()


def multi_step(
    batch, kind, corrections, keys, factor, found_inf, lr, one, two, eps, decay, l2, nesterov,
    stochastic=False,
):  # fmt: skip
    """Updates every tensor of the batch in place.

    corrections  [tensors, 2] float32: Adam's 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t); how much
                 of the gradient enters SGD's momentum, or its own factor of a step without one
    keys         [tensors] int32: of the random numbers of each in this step
    factor       float32 scalar: multiplies every gradient
    found_inf    float32 scalar or None: where it is not 0, nothing changes
    stochastic   bfloat16 parameters without a master copy are rounded up or down at random
    """
    if not batch.programs:
        return
    stochastic = stochastic and not batch.master and batch.dtypes[0] == torch.bfloat16
    param = tl.uint16 if stochastic else _TYPES[batch.dtypes[0]]
    raw = [(tl.float32, tl.uint16)[s] if s < 2 else tl.uint8 for s in batch.stores]
    with on(batch.device):
        _step_kernel[(batch.programs,)](
            batch.table, batch.pieces, corrections, keys, factor, found_inf,
            lr, one, two, eps, decay, l2,
            kind, nesterov, batch.master, batch.states, *batch.stores, stochastic, *raw, param,
            _TYPES[batch.dtypes[1]], batch.aligned, CHUNK, _BLOCK, num_warps=_WARPS,
        )  # fmt: skip
