"""Every Triton kernel, compiled ahead of time for GPUs that need not be here.

What is compiled is what the launchers launch for a row length and dtype (fastllm.kernels.aot): it
has to fit the chip's shared memory and must not spill. --exhaustive compiles all of it.
"""

import concurrent.futures
import functools
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux", allow_module_level=True)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# (backend, architecture, warp size): bytes of shared memory that one program may have
TARGETS = {
    ("cuda", 80, 32): 163 * 1024,
    ("cuda", 90, 32): 227 * 1024,
    ("cuda", 100, 32): 227 * 1024,
    ("hip", "gfx942", 64): 64 * 1024,
}


def norms(rows, cols, dtype, weight_dtype, exhaustive):
    """Launches of all four row norms at one size."""
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.norm import layer_norm_bwd, layer_norm_fwd, rms_norm_bwd, rms_norm_fwd

    x, w = meta(rows, cols, dtype=dtype), meta(cols, dtype=weight_dtype)
    full, plain = ((cols, 1e-5, 0.0), (True, True, True)), ((cols, 1e-5, 0.0), (True, False, False))
    yield from record(rms_norm_fwd, x, None, w, *full[0])
    yield from record(layer_norm_fwd, x, x, w, w, *full[0])
    yield from record(rms_norm_bwd, x, None, x, w, full[0][0], 1e-5, 0.0, (True, True))
    yield from record(layer_norm_bwd, x, x, x, w, w, *full[0], full[1])
    if exhaustive:
        yield from record(rms_norm_fwd, x, x, w, *full[0])
        yield from record(layer_norm_fwd, x, None, None, None, *full[0])
        yield from record(rms_norm_bwd, x, x, x, w, *full[0], (True, True))
        yield from record(layer_norm_bwd, x, None, x, None, None, *plain[0], plain[1])


def group_norms(shape, groups, dtype):
    """Launches of group_norm at one size."""
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.group_norm import group_norm_bwd, group_norm_fwd

    x, w = meta(*shape, dtype=dtype), meta(shape[1], dtype=dtype)
    yield from record(group_norm_fwd, x, groups, w, w, 1e-5)
    yield from record(group_norm_bwd, x, x, groups, w, w, 1e-5, (True, True, True))


def elementwise(dtype):
    """Launches of the activations, rotary embedding and embedding's backward."""
    from fastllm.kernels.activation import activation_bwd, activation_fwd
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.dropout import dropout
    from fastllm.kernels.embedding import embedding_bwd
    from fastllm.kernels.rotary import rotate

    x, both = meta(4096, 1408, dtype=dtype), (True, True)
    for function in range(4):
        yield from record(activation_fwd, function, x, x, 1, x.numel(), *[x.numel()] * 2)
        yield from record(activation_bwd, function, x, x, x, 4096, 1408, *[2816] * 3, both)
    yield from record(activation_fwd, 0, x, None, 1, x.numel(), x.numel(), 0)
    yield from record(activation_bwd, 1, x, x, None, 1, x.numel(), *[x.numel()] * 2, 0, (True, 0))
    heads, table = meta(2, 32, 4096, 128, dtype=dtype), meta(4096, 128, dtype=dtype)
    for interleaved, back in itertools.product((False, True), repeat=2):
        yield from record(rotate, heads, heads, table, table, 128, interleaved, back)
    index = meta(4096, dtype=torch.int64)
    yield from record(embedding_bwd, meta(4096, 1024, dtype=dtype), index, 32000, -1, True)
    for residual in (x, None):
        yield from record(dropout, x, residual, meta(1, dtype=torch.int64), 1.1, 2**31 + 5)
    part = meta(4096, 32, dtype=FP32)
    yield from record(rotate, heads, heads, part, part, 64, False, False)


def quants(dtype, exhaustive):
    """Launches of quantize and dequantize, in every format where that is asked for."""
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.quant import dequantize, fake_own, quantize
    from fastllm.kernels.quant_ranges import encode_given, fake_given

    from fastllm.ops.quant import layout, spec
    from fastllm.ops.quant.cases import FORMATS

    sample = [(0, 0, True), (1, 32, False), (2, 64, True), (4, -128, True), (6, 32, True)]
    for code, group, symmetric in FORMATS if exhaustive else sample:
        x = meta(4096, 4096, dtype=dtype)
        codes, scales, zeros = spec.quantized(x, code, group, symmetric)
        zeros, values = zeros if zeros.numel() else None, layout.TABLES.get(code)
        yield from record(quantize, x, codes, scales, zeros, code, group, values)
        yield from record(dequantize, codes, scales, zeros, x, code, group, values)
        yield from record(fake_own, x, x, scales, zeros, code, group, values)
        if symmetric and code != layout.MXFP8:
            ends = layout.limits(code)
            yield from record(fake_given, x, scales, None, x, None, code, group, values, ends)
            yield from record(encode_given, x, scales, codes, scales, code, group, values)
            parts = meta(4096, -(-4096 // group) if group > 0 else 1, dtype=FP32)
            yield from record(fake_given, x, scales, x, x, parts, code, group, values, ends)


@functools.cache
def launches(exhaustive):
    """Everything to compile, each specialization once, with the targets it is compiled for."""
    sizes = [(4096, 1024, BF16), (4096, 8192, BF16), (64, 768, FP16), (4096, 16384, BF16)]
    sizes += [(4096, 32768, BF16), (4096, 8192, FP32), (64, 65536, FP32), (4096, 33, BF16)]
    if exhaustive:
        widths = (1, 7, 64, 128, 512, 768, 2048, 3072, 4096, 5120, 8192, 14336, 32768, 65536)
        sizes = list(itertools.product((16, 4096), widths, (BF16, FP16, FP32)))
    found = {}
    for rows, cols, dtype in sizes:
        # H100 sees every size, the others a sample
        everywhere = exhaustive or (cols, dtype) in ((8192, BF16), (65536, FP32))
        targets = list(TARGETS) if everywhere else [("cuda", 90, 32)]
        weight_dtypes = (dtype, FP32) if exhaustive and dtype != FP32 else (dtype,)
        for weight_dtype in weight_dtypes:
            for launch in norms(rows, cols, dtype, weight_dtype, exhaustive):
                found.setdefault(launch, {}).update(dict.fromkeys(targets))
    shapes = [((8, 512, 16, 16), 32, BF16), ((8, 320, 64, 64), 32, BF16), ((3, 6), 3, FP32)]
    if exhaustive:
        shapes += [((8, 320, 64, 64), 32, d) for d in (FP16, FP32)]
        shapes += [((2, 32, 7, 7), 8, d) for d in (BF16, FP16, FP32)]
    for shape, groups, dtype in shapes:
        everywhere = exhaustive or dtype == BF16
        targets = list(TARGETS) if everywhere else [("cuda", 90, 32)]
        for launch in group_norms(shape, groups, dtype):
            found.setdefault(launch, {}).update(dict.fromkeys(targets))
    for dtype in (BF16, FP32) if exhaustive else (BF16,):
        for launch in itertools.chain(elementwise(dtype), quants(dtype, exhaustive)):
            found.setdefault(launch, {}).update(dict.fromkeys(TARGETS))
    return [(launch, target) for launch, targets in found.items() for target in targets]


def ptxas_report(ptx, arch):
    """(registers, bytes of spill stores) that ptxas reports for one kernel."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    command = [get_ptxas(arch).path, "-v", f"--gpu-name={sm_arch_from_capability(arch)}"]
    done = subprocess.run(
        [*command, "/dev/stdin", "-o", os.devnull], input=ptx, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores", done.stderr)
    return int(registers[1]), int(spills[1])


def compiled(exhaustive, index):
    """Compiles one launch in a worker: what is needed to judge it, as text and numbers."""
    from fastllm.kernels import aot
    from triton.backends.compiler import GPUTarget

    launch, target = launches(exhaustive)[index]
    kernel = aot.compile(launch, GPUTarget(*target))
    if target[0] == "cuda":
        registers, spills = ptxas_report(kernel.asm["ptx"], target[1])
        wide = "v4.b32" in kernel.asm["ptx"] or "cp.async.cg" in kernel.asm["ptx"]
    else:
        text = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: +(\d+)", text)[1])
        spills = int(re.search(r"\.vgpr_spill_count: +(\d+)", text)[1])
        wide = "dwordx4" in text
    # what depends on the row length: True where rows are known to keep 16-byte alignment
    # and a warp has 16 bytes a lane to load
    aligned = {launch.signature[i][0] for i in launch.aligned} & {"cols", "spatial"}
    blocks = [value for name, value in launch.constants if name.startswith("BLOCK")]
    exempt = not aligned or math.prod(blocks) < 8 * target[2]
    return str(launch), target, kernel.metadata.shared, registers, spills, wide or exempt


def test_kernels_compile_everywhere(request):
    exhaustive = request.config.getoption("--exhaustive")
    todo = launches(exhaustive)
    workers = max(1, len(os.sched_getaffinity(0)) // _test_workers())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = list(pool.map(compiled, itertools.repeat(exhaustive), range(len(todo)), chunksize=4))
    print(*done, sep="\n")
    assert len(done) == len(todo) > 50
    for text, target, shared, _, spills, wide in done:
        assert shared <= TARGETS[target], f"{text} on {target}: {shared} bytes of shared memory"
        # among thousands, ptxas parks a pointer or two on the stack
        assert spills <= (16 if exhaustive else 0), f"{text} on {target}: {spills} bytes spilled"
        assert wide, f"{text} on {target}: no 16-byte access"


def _test_workers():
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
