"""Attention's Triton kernels, compiled ahead of time: what fits, what spills, what they use."""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import sys
import types

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton runs on Linux", allow_module_level=True)

from test_triton_compile import TARGETS, ptxas_report

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CAPABILITIES = {80: (8, 0), 90: (9, 0), 100: (10, 0), "gfx942": None}
MATRIX_UNITS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05", "gfx942": "mfma"}
PLAIN = {"window": (-1, 0), "softcap": 0.0, "mask": None, "alibi": False, "dropout": 0.0}
EXTRAS = {
    "bool": {"mask": torch.bool, "window": (-1, -1)},
    "all": {"mask": BF16, "window": (256, 0), "softcap": 30.0, "alibi": True, "dropout": 0.1},
}


def inputs(width, dtype, packed=False, **given):
    """(Shape, Options) without memory: 32 heads to 8, 2048 tokens."""
    from fastllm.kernels.aot import meta
    from fastllm.kernels.attention_scores import Options, Shape

    options = {**PLAIN, **given}
    lead = (4096,) if packed else (2,)
    tail = () if packed else (2048,)
    q = meta(*lead, 32, *tail, width, dtype=dtype)
    k, v = (meta(*lead, 8, *tail, width, dtype=dtype) for _ in range(2))
    mask = options["mask"]
    if mask is not None:
        mask = meta(2, 1, 2048, 2048, dtype=torch.uint8 if mask == torch.bool else mask)
    ends = meta(3, dtype=torch.int32) if packed else None
    shape = Shape(
        q, k, v, mask, meta(32) if options["alibi"] else None, None,
        meta(1, dtype=torch.int64) if options["dropout"] else None, ends, ends, 2048, 2048,
    )  # fmt: skip
    numbers = Options(
        0.125, *options["window"], 0, options["softcap"], int(options["dropout"] * 2**32), 1.1,
        options["dropout"] > 0, packed,
    )  # fmt: skip
    return shape, numbers


def both(arch, width, dtype, **given):
    """(launch, what its code has to hold) of forward and backward, as they run untuned."""
    from fastllm.kernels import attention, attention_backward, attention_configs
    from fastllm.kernels.aot import meta, record

    x, options = inputs(width, dtype, **given)
    extra = attention_configs.more_than_products(x, options)
    chip, wanted = CAPABILITIES[arch], (MATRIX_UNITS[arch],) if dtype != FP32 else ()
    config = attention_configs.forward_default(chip, dtype, width, x.t, extra)
    tma = ("cp.async.bulk.tensor",) if config["tma"] and x.describable() else ()
    for launch in record(attention.attention_fwd, x, options, config):
        yield launch, wanted + tma
    config = attention_configs.backward_default(chip, dtype, width, extra)
    lse = meta(*x.q.shape[:-1])
    needs = (True, True, True, True, False)
    for launch in record(
        attention_backward.attention_bwd, x.q, None, x, options, x.q, lse, needs, config
    ):
        # blocks of 32 rows, which wide heads and bent scores need, are below a warp group's 64
        least = min(config["block_m"], config["block_n"])
        matrix = "delta" not in launch.kernel.__name__ and (arch == "gfx942" or least >= 64)
        yield launch, wanted if matrix else ()


def atomic(width):
    """The kernel that adds to the gradient of query, too."""
    from fastllm.kernels import attention_backward, attention_configs
    from fastllm.kernels.aot import meta, record

    x, options = inputs(width, BF16)
    default = attention_configs.backward_default((9, 0), BF16, width, False)
    needs = (True, True, True, False, False)
    for launch in record(
        attention_backward.attention_bwd, x.q, None, x, options, x.q, meta(*x.q.shape[:-1]), needs,
        {**default, "atomic": True},
    ):  # fmt: skip
        yield launch, ("atom.global",) if "dkdv" in launch.kernel.__name__ else ()


def decode(arch, dtype):
    """A step of a few sequences, in a contiguous cache and in pages."""
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.attention_decode import attention_decode

    q, used = meta(4, 32, 1, 128, dtype=dtype), meta(4, dtype=torch.int32)
    flat, pages = meta(4, 8, 4096, 128, dtype=dtype), meta(1024, 8, 16, 128, dtype=dtype)
    table = meta(4, 256, dtype=torch.int32)
    for cache, pages_of in ((flat, None), (pages, table)):
        for launch in record(
            attention_decode, q, cache, cache, used, pages_of, None, meta(32), 0.1, -1, 0, 0.0
        ):
            yield launch, ()


def decode_codes(dtype):
    """The same of caches of codes: bytes with a scale a row, nibbles with scales and zeros."""
    from fastllm.kernels.aot import meta, record
    from fastllm.kernels.attention_decode import Coded, attention_decode

    q, used = meta(4, 32, 1, 128, dtype=dtype), meta(4, dtype=torch.int32)
    room, groups = (4, 8, 4096), meta(4, 8, 4096, 4, dtype=BF16)
    kinds = (
        (meta(*room, 128, dtype=torch.int8), Coded(meta(*room, 1), None, 0, 128, 128)),
        (meta(*room, 64, dtype=torch.uint8), Coded(groups, groups, 1, 32, 128)),
    )
    for codes, form in kinds:
        for launch in record(
            attention_decode, q, codes, codes, used, None, None, None, 0.1, -1, 0, 0.0,
            coded=(form, form),
        ):  # fmt: skip
            yield launch, ()


def usual(arch, exhaustive):
    """All that is compiled for a chip."""
    widths = (64, 128, 256) if exhaustive or arch == 90 else (128,)
    for width in widths:
        yield from both(arch, width, BF16)
    if exhaustive or arch == 90:
        yield from both(arch, 128, BF16, **EXTRAS["all"])
        yield from both(arch, 64, FP32)
        yield from both(arch, 64, BF16, packed=True)
        yield from atomic(64)
    if exhaustive:
        for width, extra in itertools.product((64, 128, 256), EXTRAS):
            yield from both(arch, width, BF16, **EXTRAS[extra])
        yield from both(arch, 16, FP32)
        yield from both(arch, 128, FP16)
        yield from both(arch, 40, BF16, packed=True)
        yield from decode(arch, FP32)
    yield from decode(arch, BF16)
    yield from decode_codes(BF16)


@functools.cache
def launches(exhaustive):
    """(launch, target, wanted), each once."""
    found = {}
    for target in TARGETS:
        for launch, wanted in usual(target[1], exhaustive):
            found.setdefault((launch, target), wanted)
    return [(*key, wanted) for key, wanted in found.items()]


def compiled(exhaustive, index):
    """Compiles one launch in a worker: what is needed to judge it, as text and numbers."""
    from fastllm.kernels import aot
    from triton.backends.compiler import GPUTarget

    launch, target, wanted = launches(exhaustive)[index]
    kernel = aot.compile(launch, GPUTarget(*target))
    code = kernel.asm["ptx" if target[0] == "cuda" else "amdgcn"]
    if target[0] == "cuda":
        spills = ptxas_report(code, target[1])[1]
    else:
        spills = int(re.search(r"\.vgpr_spill_count: +(\d+)", code)[1])
    missing = [word for word in wanted if word not in code]
    return str(launch), target, kernel.metadata.shared, spills, missing


def test_kernels_compile_everywhere(request):
    exhaustive = request.config.getoption("--exhaustive")
    todo = launches(exhaustive)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    workers = max(1, len(os.sched_getaffinity(0)) // workers)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        done = list(pool.map(compiled, itertools.repeat(exhaustive), range(len(todo)), chunksize=2))
    assert len(done) == len(todo) > 20
    faults = []
    for text, target, shared, spills, missing in done:
        if shared > TARGETS[target]:
            faults.append(f"{text} on {target}: {shared} bytes of shared memory")
        if spills:
            faults.append(f"{text} on {target}: {spills} bytes spilled")
        if missing:
            faults.append(f"{text} on {target}: no {', '.join(missing)}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("chip", [(8, 0), (8, 9), (9, 0), None])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_configs_to_try_fit_the_chip(chip, dtype):
    from fastllm.kernels import attention_configs as configs

    for width in (16, 64, 128):  # wider ones may have the default only
        forward = configs.forward_configs(chip, dtype, width, width, 2048)
        backward = configs.backward_configs(chip, dtype, width, width)
        assert forward and backward
        assert any(c["tma"] for c in forward) is (chip == (9, 0) and dtype == BF16)
        assert any(c["atomic"] for c in backward) is (dtype == BF16)
    assert {c["block_m"] for c in configs.forward_configs(chip, dtype, 64, 64, 9)} == {16}


def test_tuned_configs_are_used(monkeypatch):
    from fastllm.ops.attention import triton_tiles

    asked = []

    def measured(device, *sizes):
        asked.append(sizes)
        return {"atomic": True}

    for name in ("FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_tiles, name, measured)
    x, options = inputs(64, BF16)
    assert len(triton_tiles.backward_config(x, options)) > 1 and not asked, "nothing to measure on"
    query = types.SimpleNamespace(
        is_cuda=True, device="cuda:0", shape=x.q.shape, dtype=x.q.dtype, stride=x.q.stride
    )
    x = dataclasses.replace(x, q=query)
    assert triton_tiles.forward_config(x, options) == {"atomic": True}
    assert triton_tiles.backward_config(x, options) == {"atomic": True}
    assert asked == [(64, 4, 2048, 2048, 64, 64, BF16, True, False)] * 2
    torch.use_deterministic_algorithms(True)
    try:
        assert triton_tiles.backward_config(x, options) == {"atomic": False}
    finally:
        torch.use_deterministic_algorithms(False)
