"""Triton kernels in Triton's interpreter, on the CPU: in processes of their own, which the first
tests here start. float32 and float16; the interpreter truncates in casts to bfloat16
(test_triton_compile and test_gpu cover that)."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from fastllm.core.op import OPS
from fastllm.core.proof import prove

HERE = os.environ.get("TRITON_INTERPRET") == "1"
PARTS = 4  # processes, for as many cores
inside = pytest.mark.skipif(not HERE, reason="runs in the process with TRITON_INTERPRET=1")


MOST_OPERATIONS = 100_000  # of attention, whose time is not that of its tensors' sizes
MOST_CODES = 2000  # of quantize and dequantize, but for these, of more than one block or pass:
LARGER = ("int8-row-3x4097", "int8-tensor-3x4097", "fp8_e4m3-block128-130x259")
# the same kinds in groups of other sizes
REPEATED = ("int8-g32", "int4-g128", "fp8_e4m3-g64", "fp8_e4m3-tensor")


def interpretable(op, case):
    """Whether a case is Triton's to serve, and small enough to be run value by value."""
    if case.dtype not in (torch.float32, torch.float16) or "triton" not in op.backends:
        return False
    if op.family in ("quant", "sparse") and (
        "bench" in case.tags or case.name.startswith(REPEATED)
    ):
        return False  # before bench's large tensors are quantized
    args = case.args()
    tensors = [args[i] for i in op.tensors if args[i] is not None]
    if op.family == "attention" and op.cost(*args).forward_flops > MOST_OPERATIONS:
        return False
    few = op.family == "quant" and not case.name.startswith(LARGER)
    most = MOST_CODES if few else 40_000
    return all(t.dtype != torch.bfloat16 and t.numel() <= most for t in tensors)


CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS.values()
    for case in op.cases
    if HERE and interpretable(op, case)
]


@pytest.mark.skipif(HERE, reason="these are those processes")
@pytest.mark.parametrize("part", range(PARTS))
def test_kernels_in_the_interpreter(part):
    """Runs a part of the rest of this file with the interpreter on."""
    triton = tuple(map(int, version("triton").split(".")[:2]))
    numpy = tuple(map(int, version("numpy").split(".")[:2]))
    if triton < (3, 7) and numpy >= (2, 4):
        pytest.skip("the interpreter of Triton 3.6 cannot loop to a tensor's value on NumPy 2.4")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-p", "no:xdist"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "FASTLLM_TEST_PART": f"{part}/{PARTS}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-2000:]


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so that what no program writes is seen: outputs and partial sums."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@inside
@pytest.mark.parametrize("op, case", CASES)
def test_case_keeps_its_error_budget(op, case):
    proof = prove(op, case, backend="triton")
    assert proof.ok, proof.message


# What the launchers' heuristics reach only with many or with long rows
GRIDS = [  # (rows, cols), multiprocessors
    ((1, 5), 2),
    ((16, 16), 2),  # several rows a program, all of them full
    ((129, 16), 1),  # a last block of one row
    ((100, 33), 3),  # persistent programs with unequal shares
    ((11, 1300), 1),
    ((3, 8193), 2),  # backward past MAX_BACKWARD: two kernels
    ((2, 40000), 2),  # forward past MAX_FORWARD: two passes
]
PARAMS = [
    (1, 1, torch.float32),
    (0, 0, torch.float32),
    (1, 0, torch.float16),
    (0, 1, torch.float32),
]


def close(value, exact, dtype, terms=1):
    """Within a few roundings of the largest value, or of the size of a sum of `terms` values.

    The budget proper is held by CASES.
    """
    assert value.shape == exact.shape and value.dtype == dtype
    error = (value.double() - exact).abs().max().item()
    size = max(terms**0.5, exact.abs().max().item())
    assert error <= 8 * torch.finfo(dtype).eps * size, error


def double(values):
    return [a.double() if isinstance(a, Tensor) else a for a in values]


def check_against_reference(op, args, dtypes, parts):
    """Forward and backward of the Triton backend with random upstream gradients."""
    triton = op.backends["triton"]
    out = triton.forward(*args)
    outputs = out if op.outputs > 1 else (out,)
    exact = op.reference(*double(args))
    for value, wanted in zip(outputs, exact if op.outputs > 1 else (exact,), strict=True):
        close(value, wanted, args[0].dtype)
    saved = op.saved(args, out)
    upstream = [torch.randn_like(o) for o in outputs]
    for needs in parts:
        grads = triton.backward(*upstream, *saved, needs)
        wanted = op.reference_backward(*double(upstream), *double(saved), needs)
        assert [g is None for g in grads] == [g is None for g in wanted]
        for grad, dtype, right in zip(grads, dtypes, wanted, strict=True):
            if right is not None:
                close(grad, right, dtype, args[0].numel() // right.numel())


@inside
@pytest.mark.parametrize("sizes, processors", GRIDS, ids=str)
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_grids(name, sizes, processors, monkeypatch):
    from fastllm.kernels import norm

    monkeypatch.setattr(norm, "multiprocessors", lambda device: processors)
    op, layer, add = OPS[name], "layer" in name, "add" in name
    full = (True,) * op.results
    parts = (full, (False, *full[1:]), (True, *[False] * (op.results - 1)))
    small = sizes[0] * sizes[1] < 2000
    for has_weight, has_bias, weight_dtype in PARAMS if small and not add else PARAMS[:1]:
        dtype = torch.float16 if weight_dtype == torch.float16 else torch.float32
        x = torch.randn(sizes).to(dtype)
        extra = (torch.randn(sizes).to(dtype),) if add else ()
        params = [torch.randn(sizes[1]).to(weight_dtype) if has_weight else None]
        params += [torch.randn(sizes[1]).to(weight_dtype) if has_bias else None] * layer
        args = (x, *extra, sizes[1:], *params, 1e-5, 0.5)
        dtypes = (dtype, weight_dtype, weight_dtype)[: op.results]
        check_against_reference(op, args, dtypes, parts if small else (full,))


@inside
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_no_rows_past_the_end_with_zero_eps(name):
    """Rows past the end are zeros; with eps = 0 they must not reach the weight's gradient."""
    op = OPS[name]
    args = (torch.randn(17, 8), (8,), torch.randn(8), *[torch.randn(8)] * ("layer" in name))
    grads = op.backends["triton"].backward(
        torch.randn(17, 8), *args, 0.0, 0.0, (True,) * op.results
    )
    assert all(g.isfinite().all() for g in grads)


@inside
def test_weight_gradients_are_deterministic():
    from fastllm.kernels import norm

    x, dy, w = torch.randn(300, 64), torch.randn(300, 64), torch.randn(64)
    first = norm.layer_norm_bwd(dy, None, x, w, w, 64, 1e-5, 0.0, (True,) * 3)
    again = norm.layer_norm_bwd(dy, None, x, w, w, 64, 1e-5, 0.0, (True,) * 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@inside
@pytest.mark.parametrize(
    "shape, groups",
    [
        ((2, 4, 70, 71), 2),
        ((1, 6, 33, 100), 2),
        ((3, 70), 7),
        ((1, 2, 129, 130), 1),
        ((2, 12, 700), 1),
    ],
    ids=str,
)
def test_group_norm_sizes(shape, groups):
    x, w, b = torch.randn(shape) + 2, torch.randn(shape[1]), torch.randn(shape[1])
    parts = ((True, True, True), (True, False, False), (False, True, False), (False, False, True))
    check_against_reference(OPS["group_norm"], (x, groups, w, b, 1e-5), (torch.float32,) * 3, parts)


@inside
def test_what_the_tuner_would_measure_of_attention():
    """Configs with and without descriptors, and gradients of query by a pass or by atomics."""
    from fastllm.ops.attention import triton_tiles

    sizes = (4, 2, 20, 40, 16, 16, torch.float16, True, True)
    dout, out, lse, *args = triton_tiles.BACKWARD.build(torch.device("cpu"), *sizes)
    terms = (None, None, None, None, 0.0, 0.25, -1, 0, 0, 30.0)
    op, given = OPS["attention"], [*double(args[:3]), *terms]
    exact = op.reference(*given)
    wanted = op.reference_backward(
        dout.double(), *given[:7], exact, lse, *given[7:], (True, True, True, False, False)
    )
    forward = triton_tiles.FORWARD.candidates("cpu", sizes)
    found = {c["tma"]: c for c in forward.values()}
    assert len(forward) > 3 and len(found) == 2
    for chosen in found.values():
        close(triton_tiles.FORWARD.run(chosen, *args)[0], exact, torch.float16)
    backward = triton_tiles.BACKWARD.candidates("cpu", sizes)
    found = {c["atomic"]: c for c in backward.values() if c["block_n"] <= 64}
    assert len(backward) > 3 and len(found) == 2
    for chosen in found.values():
        grads = triton_tiles.BACKWARD.run(chosen, dout, out, lse, *args)
        for grad, right in zip(grads[:3], wanted[:3], strict=True):
            close(grad, right, torch.float16)
