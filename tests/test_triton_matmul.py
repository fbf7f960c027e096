"""The matrix products in Triton, compiled ahead of time: what fits, what spills, what they use."""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux", allow_module_level=True)

from test_triton_compile import TARGETS, ptxas_report

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0), "gfx942": None}
PROCESSORS = {80: 108, 90: 132, 100: 148, "gfx942": 304}
LAYOUTS = ("nt", "nn", "tn")  # y = x W^T, dx = dy W, dW = dy^T x
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}


def operands(m, n, k, dtype, layout):
    """A [M, K] and B [K, N] without memory; "t" is a transposed view."""
    from fastllm.kernels.aot import meta

    a = meta(k, m, dtype=dtype).t() if layout[0] == "t" else meta(m, k, dtype=dtype)
    b = meta(n, k, dtype=dtype).t() if layout[1] == "t" else meta(k, n, dtype=dtype)
    return a, b


def defaults(arch, exhaustive):
    """(launch, config, what its code has to hold) of what runs untuned."""
    from fastllm.kernels import matmul as mm
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.matmul_configs import default_config
    from fastllm.kernels.tiles import lanes

    chip, sms, unit = CAPABILITIES[arch], PROCESSORS[arch], (MATRIX_UNITS[arch],)
    big, flat, deep = (4096, 4096, 4096), (16, 4096, 4096), (128, 128, 16384)
    sizes = [(big, BF16, layout, False, unit) for layout in LAYOUTS]
    sizes += [(deep, BF16, "nn", False, ()), (big, FP32, "nt", False, ())]
    sizes += [(big, FP32, "nt", True, ())] * (arch != "gfx942")
    if exhaustive or arch == 90:
        sizes += [(flat, BF16, "nt", False, ()), (flat, FP32, "nt", False, ())]
    if exhaustive:
        sizes += [(s, d, x, False, ()) for s in (big, flat) for d in (FP16, FP32) for x in LAYOUTS]
        sizes += [((1000, 333, 77), d, x, False, ()) for d in (FP16, FP32) for x in LAYOUTS]
    for (m, n, k), dtype, layout, tf32, wanted in sizes:
        a, b = operands(m, n, k, dtype, layout)
        config = default_config(m, n, k, dtype, chip, sms, tf32=tf32)
        for launch in record(mm.matmul, a, b, config=config, tf32=tf32):
            yield launch, config, wanted if "add_splits" not in str(launch) else ()
    a, b = operands(*big, BF16, "nt")
    config = default_config(*big, BF16, chip, sms, lanes=64)
    full = {"activation": "gelu", "preactivation": True, "config": config}
    for launch in record(mm.matmul, a, b, meta(4096, dtype=BF16), a, **full):
        yield launch, config, unit
    held = lanes(chip, True)
    config = default_config(*big, BF16, chip, sms, products=2, lanes=held)
    for launch in record(mm.gated_matmul, a, b, b, preactivation=True, config=config):
        yield launch, config, unit


def experts(arch, exhaustive):
    """As `defaults`, of the products of experts: forward, both gradients."""
    from fastllm.kernels import grouped_matmul as grouped
    from fastllm.kernels.aot import meta, record

    chip, unit = CAPABILITIES[arch], (MATRIX_UNITS[arch],)
    for count, dtype in [(8, BF16), (64, FP32)][: 2 if exhaustive or arch == 90 else 1]:
        tokens, n, k = 4096, 2048, 1024
        x, dy = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype)
        w, ends = meta(count, n, k, dtype=dtype), meta(count, dtype=torch.int32)
        wanted = unit if dtype == BF16 else ()
        sms = PROCESSORS[arch] // count
        for left, right, sizes in ((x, w.mT, (512, n, k)), (dy, w, (512, k, n))):
            config = grouped.grouped_config(*sizes, dtype, chip, sms)
            for launch in record(grouped.grouped_matmul, left, right, ends, config=config):
                yield launch, config, wanted
        config = grouped.grouped_config(n, k, 512, dtype, chip, sms)
        for launch in record(grouped.grouped_weight_grad, dy, x, ends, count, config=config):
            yield launch, config, wanted
        for launch in record(grouped.grouped_bias_grad, dy, ends, count):
            yield launch, None, ()


def backward_kernels():
    from fastllm.kernels import matmul_backward as back
    from fastllm.kernels.aot import meta, record

    x = meta(4096, 1408, dtype=BF16)
    for launch in record(back.slope_bwd, x, x, "gelu", extra=x, bias_dtype=BF16):
        yield launch, None, ()
    for launch in record(back.gated_slope_bwd, x, x, x, "silu"):
        yield launch, None, ()


def every_config(arch, dtype):
    """Each config that the tuner may try; spills there are the tuner's to find."""
    from fastllm.kernels import matmul as mm
    from fastllm.kernels.aot import record
    from fastllm.kernels.matmul_configs import configs

    a, b = operands(4096, 4096, 4096, dtype, "nt")
    for config in configs(dtype, CAPABILITIES[arch]):
        wanted = ()
        if config.tma:
            unit = MATRIX_UNITS[arch]
            wanted = (unit, "cp.async.bulk.tensor") + ("setmaxnreg",) * config.specialize
        for launch in record(mm.matmul, a, b, config=config):
            yield launch, config, wanted


@functools.cache
def launches(exhaustive):
    """(launch, target, config, wanted, must not spill) of all that is compiled, each once."""
    found = {}
    for target in TARGETS:
        arch = target[1]
        usual = [*defaults(arch, exhaustive), *experts(arch, exhaustive), *backward_kernels()]
        for launch, config, wanted in usual:
            found.setdefault((launch, target), (config, wanted, True))
        for dtype in (BF16, FP32) if exhaustive else (BF16,) * (arch == 90):
            for launch, config, wanted in every_config(arch, dtype):
                if not (exhaustive or config.tma):
                    continue
                found.setdefault((launch, target), (config, wanted, False))
    return [(*key, *value) for key, value in found.items()]


def compiled(exhaustive, index):
    """Compiles one launch in a worker: what is needed to judge it, as text and numbers."""
    from fastllm.kernels import aot
    from triton.backends.compiler import GPUTarget

    launch, target, config, wanted, strict = launches(exhaustive)[index]
    kernel = aot.compile(launch, GPUTarget(*target))
    code = kernel.asm["ptx" if target[0] == "cuda" else "amdgcn"]
    if target[0] == "cuda":
        spills = ptxas_report(code, target[1])[1]
    else:
        spills = int(re.search(r"\.vgpr_spill_count: +(\d+)", code)[1])
    itemsize = 4 if "*fp32" in str(launch).split("(")[0].split("[")[1].split()[0] else 2
    products = 2 if ("b2_ptr", "constexpr") not in launch.signature else 1
    model = None
    if config is not None and target[0] == "cuda" and "matmul" in str(launch):
        model = config.shared_bytes(itemsize, products)
    missing = [word for word in wanted if word not in code]
    return str(launch), target, kernel.metadata.shared, model, spills if strict else 0, missing


def test_products_compile_everywhere(request):
    exhaustive = request.config.getoption("--exhaustive")
    todo = launches(exhaustive)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    workers = max(1, len(os.sched_getaffinity(0)) // workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = list(pool.map(compiled, itertools.repeat(exhaustive), range(len(todo)), chunksize=4))
    assert len(done) == len(todo) > 50
    faults = []
    for text, target, shared, model, spills, missing in done:
        if shared > TARGETS[target]:
            faults.append(f"{text} on {target}: {shared} bytes of shared memory")
        if model is not None and shared > model:
            faults.append(f"{text} on {target}: {shared} bytes shared, the model says {model}")
        if spills:
            faults.append(f"{text} on {target}: {spills} bytes spilled")
        if missing:
            faults.append(f"{text} on {target}: no {', '.join(missing)}")
    assert not faults, "\n".join(faults)


def test_default_configs_fit_every_chip():
    """For sizes nobody thought of: what the chip can hold, and no more parts than K has."""
    from fastllm.kernels.matmul_configs import default_config
    from fastllm.kernels.tiles import SHARED, fits

    sizes = (1, 15, 16, 100, 4096, 100_000)
    for m, n, k in itertools.product(sizes, repeat=3):
        for chip, dtype in itertools.product(SHARED, (FP32, BF16)):
            for products in (1, 2):
                config = default_config(m, n, k, dtype, chip, 132, products=products)
                assert fits(config, chip, dtype, products)
                assert config.split_k == 1 or config.split_k * config.block_k <= k


def test_a_measured_tile_is_taken(monkeypatch):
    from types import SimpleNamespace

    from fastllm.kernels.tiles import Config

    from fastllm.ops.matmul import triton_tiles

    known = Config(64, 64, 32, 4, 2)
    asked = []

    def measured(device, *sizes):
        asked.append(sizes)
        return dataclasses.asdict(known)

    monkeypatch.setattr(triton_tiles, "TILES", measured)
    a, b = torch.empty(16, 32), torch.empty(48, 32).t()
    assert triton_tiles.pick(a, b, 1, True, False) != known and not asked  # nothing to measure on
    on_gpu = SimpleNamespace(
        is_cuda=True, device="cuda:0", shape=a.shape, dtype=a.dtype, stride=a.stride
    )
    assert triton_tiles.pick(on_gpu, b, 1, True, False) == known
    assert asked == [(16, 32, 48, True, True, torch.float32, 1, True, False)]
