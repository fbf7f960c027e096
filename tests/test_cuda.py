"""CUDA C++ kernels on a machine without a GPU: what was built, and the kernels themselves, run by
a small emulator of CUDA's threads, barriers and clusters (tests/cuda_on_cpu)."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastllm.core.op import OPS

try:
    from fastllm import _cuda
except ImportError:
    _cuda = None

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
CODES = {FP32: 0, BF16: 1, FP16: 2}
built = pytest.mark.skipif(_cuda is None, reason="built without CUDA: no nvcc")


def toolkit():
    """The headers of the CUDA toolkit on the PATH, or None."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    done = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    include = Path(top[1].strip(), "include") if top else Path(nvcc).resolve().parent / "../include"
    return include if (include / "cuda_runtime.h").exists() else None


def cuobjdump():
    """The path of cuobjdump: the toolkit's, or the one in Triton's wheel."""
    import triton

    own = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(own) if own.exists() else None)


# ---- what was built


@built
def test_extension_holds_all_architectures():
    tool = cuobjdump()
    assert tool, "no cuobjdump: neither the toolkit's nor Triton's"
    elf = subprocess.run([tool, "--list-elf", _cuda.__file__], capture_output=True, text=True)
    ptx = subprocess.run([tool, "--list-ptx", _cuda.__file__], capture_output=True, text=True)
    archs = os.environ.get("FASTLLM_CUDA_ARCHS", "80;90").replace(",", ";").replace(".", "")
    for arch in archs.split(";"):
        assert f"sm_{arch}" in elf.stdout, elf.stdout + elf.stderr
    assert ".ptx" in ptx.stdout, ptx.stdout + ptx.stderr


@built
def test_kernels_do_not_spill():
    """The local memory of a kernel is spilled registers: none of these has arrays of its own."""
    done = subprocess.run(
        [cuobjdump(), "-res-usage", _cuda.__file__], capture_output=True, text=True
    )
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert len(found) > 50, done.stdout[-2000:]
    spilled = [(name, stack) for name, _, stack in found if int(stack)]
    assert not spilled, spilled


@built
def test_imports_and_refuses_without_a_gpu():
    code = """
import fastllm._cuda as m
from fastllm.ops.norm import cuda
print(cuda.available())
"""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "no CUDA device"


@built
@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": 3}, "dtype: expected 0, 1 or 2"),
        ({"dtype": 1, "weight_dtype": 2}, "weight_dtype: expected dtype or 0"),
        ({"rows": 0}, "rows: out of range"),
        ({"rows": 2**31}, "rows: out of range"),
        ({"cols": 0}, "cols: out of range"),
        ({"cols": 2**31}, "cols: out of range"),
    ],
    ids=lambda value: str(value),
)
def test_bad_arguments_are_named(change, message):
    names = ["input", "residual", "weight", "bias", "output", "new_residual"]
    given = dict.fromkeys(names, 0) | {"center": False, "dtype": 0, "weight_dtype": 0, "rows": 1}
    given |= {"cols": 4, "eps": 0.0, "weight_offset": 0.0, "device": 0, "stream": 0}
    with pytest.raises(ValueError, match=re.escape(message)):
        _cuda.norm_fwd(**(given | change))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_device_is_an_error():
    with pytest.raises(RuntimeError, match="CUDA: "):
        _cuda.norm_bwd_workspace(0, 1, 4, 4, 0)


# ---- the kernels, emulated


def emulated(name, folder):
    """The kernels of tests/cuda_on_cpu/NAME.cpp as a library, built in a folder."""
    include, compiler = toolkit(), shutil.which(os.environ.get("CXX", "g++"))
    if include is None or compiler is None or not CSRC.exists():
        pytest.skip("needs the CUDA toolkit's headers and a C++ compiler")
    path = folder / f"{name}.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"-I{CSRC}", f"-isystem{include}"]
    done = subprocess.run(
        [compiler, *flags, str(HERE / f"cuda_on_cpu/{name}.cpp"), "-o", str(path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return emulated("norm", tmp_path_factory.mktemp("cuda"))


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def poisoned(like):
    return None if like is None else torch.full_like(like, float("nan"))


def close(value, exact, terms=1):
    """Within a few roundings of the largest value, or of the size of a sum of `terms` values."""
    error = (value.double() - exact).abs().max().item()
    size = max(terms**0.5, exact.abs().max().item())
    assert error <= 8 * torch.finfo(value.dtype).eps * size, error


def double(values):
    return [a.double() if isinstance(a, Tensor) else a for a in values]


# (rows, cols, input, weights, aligned): each way the launchers choose
FORWARD = [
    (3, 64, BF16, BF16, True),  # several rows a block, and rows past the end
    (9, 256, FP16, FP32, True),
    (5, 512, BF16, FP32, True),
    (3, 768, FP32, FP32, True),
    (2, 5128, BF16, BF16, True),
    (1, 17000, FP16, FP16, True),
    (3, 33, FP32, FP32, False),  # rows of any length
    (2, 1000, BF16, BF16, False),
    (1, 40000, FP32, FP32, True),
]


@pytest.mark.parametrize("rows, cols, dtype, weight_dtype, aligned", FORWARD, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_forward(emulator, name, rows, cols, dtype, weight_dtype, aligned):
    op, layer, add = OPS[name], "layer" in name, "add" in name
    x, r = torch.randn(rows, cols).to(dtype) + 1, torch.randn(rows, cols).to(dtype) if add else None
    for has_weight, has_bias in ((1, 1), (0, 0), (0, 1))[: 3 if cols < 1000 else 1]:
        w = torch.randn(cols).to(weight_dtype) if has_weight else None
        b = torch.randn(cols).to(weight_dtype) if has_bias and layer else None
        y, h = poisoned(x), poisoned(r)
        error = emulator.emulate_forward(
            int(layer),
            CODES[dtype],
            int(weight_dtype == FP32),
            *map(address, (x, r, w, b, y, h)),
            ctypes.c_int64(rows),
            cols,
            ctypes.c_float(1e-5),
            ctypes.c_float(0.5),
            int(aligned),
        )
        assert error == 0
        args = (x, *([r] if add else []), (cols,), w, *([b] if layer else []), 1e-5, 0.5)
        exact = op.reference(*double(args))
        if add:
            assert torch.equal(h, x + r)
            exact = op.reference(*double((h, torch.zeros_like(h), *args[2:])))[0]
        close(y, exact)


# (rows, cols, input, weights, aligned, multiprocessors, clusters), blocks that share a row
BACKWARD = [
    ((7, 64, BF16, BF16, True, 2, True), 1),
    ((21, 256, FP16, FP32, True, 1, True), 1),  # several row blocks a program, unequal shares
    ((5, 1032, FP32, FP32, True, 1, False), 1),
    ((3, 4096, BF16, FP32, True, 1, False), 1),
    ((3, 8200, BF16, BF16, True, 2, True), 2),
    ((2, 16400, BF16, FP32, True, 3, True), 4),  # the last block has less than its stretch
    ((2, 8192, FP32, FP32, True, 2, True), 1),
    ((2, 8200, FP16, FP16, True, 2, False), 0),  # no clusters before compute capability 9.0
    ((5, 33, FP32, FP32, False, 1, True), 0),
    ((3, 700, BF16, BF16, False, 2, True), 0),
]


@pytest.mark.parametrize("sizes, blocks", BACKWARD, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_backward(emulator, name, sizes, blocks):
    rows, cols, dtype, weight_dtype, aligned, processors, clusters = sizes
    op, layer, add = OPS[name], "layer" in name, "add" in name
    h, dy = torch.randn(rows, cols).to(dtype) + 1, torch.randn(rows, cols).to(dtype)
    dh = torch.randn(rows, cols).to(dtype) if add else None
    full = (True,) * op.results
    parts = (full, (False, *full[1:]), (True, *[False] * (op.results - 1)))
    for has_weight in (1, 0)[: 2 if cols < 1000 else 1]:
        for needs in parts[: 3 if cols < 1000 else 1]:
            w = torch.randn(cols).to(weight_dtype) if has_weight else None
            b = torch.randn(cols).to(weight_dtype) if layer else None
            dx = poisoned(h) if needs[0] else None
            dw = poisoned(w) if needs[1] else None
            db = poisoned(b) if layer and needs[2] else None
            shared = emulator.emulate_backward(
                int(layer),
                CODES[dtype],
                int(weight_dtype == FP32),
                *map(address, (dy, dh, h, w, dx, dw, db)),
                ctypes.c_int64(rows),
                cols,
                ctypes.c_float(1e-5),
                ctypes.c_float(0.5),
                int(aligned),
                processors,
                int(clusters),
            )
            assert shared == blocks
            saved = (h, (cols,), w, *([b] if layer else []), 1e-5, 0.5)
            upstream = (dy, dh) if add else (dy,)
            exact = op.reference_backward(*double(upstream), *double(saved), needs)
            for value, wanted in zip((dx, dw, db), exact, strict=False):
                assert (value is None) == (wanted is None)
                if value is not None:
                    close(value, wanted, h.numel() // value.numel())


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_zero_eps_and_rows_past_the_end(emulator, name):
    """Rows past the end must not reach the weight's gradient, whatever their rstd."""
    rows, cols, layer = 5, 64, name == "layer_norm"
    h, dy, w = torch.randn(rows, cols), torch.randn(rows, cols), torch.randn(cols)
    dx, dw, db = poisoned(h), poisoned(w), poisoned(w) if layer else None
    blocks = emulator.emulate_backward(
        int(layer), 0, 1, *map(address, (dy, None, h, w, dx, dw, db)), ctypes.c_int64(rows), cols,
        ctypes.c_float(0.0), ctypes.c_float(0.0), 1, 1, 0,
    )  # fmt: skip
    assert blocks == 1
    assert all(g.isfinite().all() for g in (dx, dw, db) if g is not None)
