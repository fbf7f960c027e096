"""Attention backward: dK and dV by blocks of keys, then dQ by blocks of queries, each from scores
that are computed again (Dao 2023). No atomics, unless a config asks for dQ from the first pass.

With P = exp(score - lse) and delta = rowsum(dO O) - dlse: dV = P^T dO, dS = P (dO V^T - delta),
dQ = scale dS K, dK = scale dS^T Q.
"""

import torch
import triton
import triton.language as tl
from fastllm.kernels.attention import padded
from fastllm.kernels.attention_dkdv import dkdv_kernel
from fastllm.kernels.attention_dq import dq_kernel, sum_again_kernel
from fastllm.kernels.device import on
from fastllm.kernels.tiles import precision


@triton.jit
def _delta_kernel(
    out_ptr,
    do_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    safe_ptr,
    rows,
    H,
    T,
    DV,
    stride_db,
    stride_dh,
    stride_dt,
    stride_gb,
    stride_gh,
    stride_gt,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # Program p owns BLOCK rows of out: delta, and lse as the other kernels read it (inf: P is 0).
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PACKED:  # out is [tokens, H, DV], else [B, H, T, DV]
        b, h, t = tl.zeros_like(row), row % H, row // H
    else:
        b, h, t = row // T // H, row // T % H, row % T
    d = tl.arange(0, BLOCK_DV)
    inside = (row < rows)[:, None] & (d < DV)[None, :]
    o = tl.load(out_ptr + row[:, None] * DV + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = b * stride_db + h * stride_dh + t * stride_dt
    do = tl.load(do_ptr + at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    lse = tl.load(lse_ptr + row, mask=row < rows, other=float("-inf"))
    blind = lse == float("-inf")
    if dlse_ptr is not None:
        at = b * stride_gb + h * stride_gh + t * stride_gt
        delta -= tl.load(dlse_ptr + at, mask=(row < rows) & (lse != float("-inf")), other=0.0)
    tl.store(delta_ptr + row, tl.where(blind, 0.0, delta), mask=row < rows)
    tl.store(safe_ptr + row, tl.where(blind, float("inf"), lse), mask=row < rows)


def attention_bwd(dout, dlse, shape, options, out, lse, needs, config):
    """(dq, dk, dv, dmask in fp32, dsinks), None where not needed.

    dout and dlse (or None) have the layouts of out and lse; out and lse are contiguous.
    """
    x = shape
    # grids of packed sequences have rows that no program owns
    new = torch.empty if x.cu_q is None else torch.zeros
    dq, dk, dv = (
        new(y.shape, dtype=y.dtype, device=y.device) if needed else None
        for y, needed in zip((x.q, x.k, x.v), needs, strict=False)
    )
    delta, safe = _delta(dout, dlse, x, out, lse)
    dmask = x.mask is not None and needs[3] and x.mask.dtype != torch.uint8
    grad_mask = _mask_gradient(x) if dmask else None
    weight = None
    with on(x.q.device):
        if lse.numel() and x.k.numel():
            common = (x.mask, x.slopes, x.seed, x.cu_q, x.cu_k, safe, delta)
            if x.q.dtype == torch.float32:
                weight = _sum_again(dout, dlse, x, options, common, config)
            common = (*common, weight)
            atomic = config["atomic"] and dq is not None
            if dk is not None or dv is not None or atomic:
                dq = _dkdv(dout, x, options, common, dq, dk, dv, config, atomic)
            if (dq is not None and not atomic) or grad_mask is not None:
                into = None if atomic else dq
                _dq(dout, x, options, common, into, grad_mask, config)
        else:
            for grad in (dq, dk, dv):
                if grad is not None:
                    grad.zero_()
    if grad_mask is not None:
        grad_mask = grad_mask.sum_to_size(x.mask.shape)
    dsinks = None
    if x.sinks is not None and needs[4]:
        heads = (1, -1, 1) if x.cu_q is None else (1, -1)
        share = torch.exp(x.sinks.double().view(heads) - safe)
        share = share if weight is None else share * weight
        dims = (0, 2) if x.cu_q is None else 0
        dsinks = -(share * delta).sum(dims).to(x.sinks.dtype)
    return dq, dk, dv, grad_mask, dsinks


def _mask_gradient(x):
    """Zeros in fp32 that the mask's gradient is written to, or, as the mask broadcasts, added to;
    of full size where results have to be deterministic."""
    full = (x.batch, x.heads, x.t, x.s)
    whole = torch.are_deterministic_algorithms_enabled()
    return torch.zeros(full if whole else x.mask.shape, dtype=torch.float32, device=x.q.device)


def _delta(dout, dlse, x, out, lse):
    """(delta, lse with inf where a row saw nothing), as lse."""
    delta, safe = torch.empty_like(lse), torch.empty_like(lse)
    rows, block_dv = lse.numel(), padded(x.dv)
    if rows:
        block = max(1, min(128, 4096 // block_dv))
        of_lse = (0, 0, 0) if dlse is None else x.strides(dlse)
        with on(out.device):
            _delta_kernel[(triton.cdiv(rows, block),)](
                out, dout, lse, dlse, delta, safe, rows, x.heads, x.t, x.dv, *x.strides(dout),
                *of_lse, x.cu_q is not None, block, block_dv, num_warps=4,
            )  # fmt: skip
    return delta, safe


def _numbers(options):
    return (
        options.scale, options.softcap, options.threshold, options.factor, options.left,
        options.right, options.diagonal, options.bottom, options.left >= 0, options.right >= 0,
        options.softcap > 0.0, options.dropout,
    )  # fmt: skip


def _dkdv(dout, x, options, common, dq, dk, dv, config, atomic):
    """Fills dk and dv; with `atomic`, returns dq, summed in fp32 in no fixed order."""
    dk = torch.empty_like(x.k, memory_format=torch.contiguous_format) if dk is None else dk
    dv = torch.empty_like(x.v, memory_format=torch.contiguous_format) if dv is None else dv
    total = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device) if atomic else None
    strides = (x.q, x.k, x.v, dout, common[5], dk, dv)
    tiles = triton.cdiv(x.s, config["block_n"])
    dkdv_kernel[(tiles * x.batch * x.groups,)](
        x.q, x.k, x.v, dout, *common, dk, dv, total, x.t, x.s, x.heads, x.heads // x.groups, x.d,
        x.dv, tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if total is None else x.strides(total)), *x.mask_strides(x.mask),
        x.slopes_stride(), *_numbers(options), precision(x.q.dtype, x.tf32), config["block_m"],
        config["block_n"], padded(x.d), padded(x.dv), num_warps=config["warps"],
        num_stages=config["stages"],
    )  # fmt: skip
    return dq if total is None else total.to(dq.dtype)


def _dq(dout, x, options, common, dq, dmask, config):
    """Fills dq and the mask's gradient, where they are wanted."""
    block_m, block_n = config["block_n"], config["block_m"]
    tiles = triton.cdiv(x.t, block_m)
    strides = (x.q, x.k, x.v, dout, common[5])
    full = dmask is not None and tuple(dmask.shape) == (x.batch, x.heads, x.t, x.s)
    dq_kernel[(tiles * x.batch * x.heads,)](
        x.q, x.k, x.v, dout, *common, dq, dmask, x.t, x.s, x.heads, x.heads // x.groups, x.d, x.dv,
        tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if dq is None else x.strides(dq)), *x.mask_strides(x.mask),
        *x.mask_strides(dmask), x.slopes_stride(), *_numbers(options), not full,
        precision(x.q.dtype, x.tf32), block_m, block_n, padded(x.d), padded(x.dv),
        num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip


def _sum_again(dout, dlse, x, options, common, config):
    """What exp(score - lse) is to be multiplied by, as lse; overwrites delta."""
    weight = torch.zeros_like(common[5])
    block_m, block_n = config["block_n"], config["block_m"]
    tiles = triton.cdiv(x.t, block_m)
    strides = (x.q, x.k, x.v, dout, common[5])
    sum_again_kernel[(tiles * x.batch * x.heads,)](
        x.q, x.k, x.v, dout, *common, weight, x.sinks, dlse, x.t, x.s, x.heads,
        x.heads // x.groups, x.d, x.dv, tiles, *[s for y in strides for s in x.strides(y)],
        *((0, 0, 0) if dlse is None else x.strides(dlse)), *x.mask_strides(x.mask),
        x.slopes_stride(), *_numbers(options), precision(x.q.dtype, x.tf32), block_m, block_n,
        padded(x.d), padded(x.dv), num_warps=config["warps"], num_stages=config["stages"],
    )  # fmt: skip
    return weight
