"""What only a GPU can tell: every CASE on the device, determinism, other devices and streams, more
than 2^31 elements, and compute-sanitizer on a small case. Skipped where there is no GPU."""

import shutil
import subprocess
import sys

import pytest
import torch

from fastllm.core.op import OPS
from fastllm.core.proof import prove

pytestmark = pytest.mark.gpu

BACKENDS = ("triton", "cuda")
CASES = [
    pytest.param(op, case, name, id=f"{op.name}-{name}-{case.name}")
    for op in OPS.values()
    for name in BACKENDS
    if name in op.backends
    for case in op.cases
]


def has(op, name):
    """Skips where this machine cannot run the backend."""
    if op.backends[name].missing:
        pytest.skip(f"{name}: {op.backends[name].missing}")


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, so that what no program writes is seen: outputs and partial sums."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("op, case, name", CASES)
def test_case_keeps_its_error_budget(op, case, name):
    has(op, name)
    reason = op.why_not(name, case.args("cuda"))
    if reason is not None:
        pytest.skip(reason)
    proof = prove(op, case, backend=name, device="cuda")
    assert proof.ok, proof.message


WIDTHS = (
    512,
    768,
    1000,
    1024,
    1536,
    2048,
    3072,
    4096,
    5120,
    8192,
    12288,
    16384,
    32768,
    65536,
    262144,
)


@pytest.mark.parametrize("cols", WIDTHS)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["rms_norm", "add_layer_norm"])
def test_every_width(kind, name, cols):
    """Each way the launchers choose, with enough rows for a persistent grid of several turns."""
    op = OPS[kind]
    has(op, name)
    rows, layer = max(3, min(5000, 2**24 // cols)) | 1, kind == "add_layer_norm"
    make = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, device="cuda", generator=make).bfloat16()

    x, w = random(rows, cols), random(cols)
    args = (
        (x, random(rows, cols), (cols,), w, w, 1e-5, 0.0) if layer else (x, (cols,), w, 1e-6, 0.0)
    )
    out = op.backends[name].forward(*args)
    exact = op.reference(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    outputs, wanted = (out, exact) if layer else ((out,), (exact,))
    saved = op.saved(args, out)
    upstream = [random(rows, cols) for _ in outputs]
    needs = (True,) * op.results
    grads = op.backends[name].backward(*upstream, *saved, needs)
    right = op.reference_backward(
        *[g.double() for g in upstream],
        *[a.double() if isinstance(a, torch.Tensor) else a for a in saved],
        needs,
    )
    for value, of in zip((outputs[0], *grads), (wanted[0], *right), strict=True):
        error = (value.double() - of).abs().max() / of.abs().max()
        assert error < 2**-8, error  # one rounding of the largest value
    again = op.backends[name].backward(*upstream, *saved, needs)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_runs_on_the_current_stream(name):
    op = OPS["rms_norm"]
    has(op, name)
    x, w = torch.randn(4096, 4096, device="cuda"), torch.randn(4096, device="cuda")
    wanted = op.backends[name].forward(x, (4096,), w, 1e-6, 0.0)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(10_000_000)
        late.copy_(x)
        found = op.backends[name].forward(late, (4096,), w, 1e-6, 0.0)
    side.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", BACKENDS)
def test_runs_on_its_tensors_device(name):
    op = OPS["layer_norm"]
    has(op, name)
    x, w = torch.randn(64, 512, device="cuda:1"), torch.randn(512, device="cuda:1")
    out = op.backends[name].forward(x, (512,), w, w, 1e-5, 0.0)
    wanted = op.reference(x.double(), (512,), w.double(), w.double(), 1e-5, 0.0)
    assert out.device == x.device and torch.cuda.current_device() == 0
    assert (out - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", BACKENDS)
def test_more_than_2_to_the_31_elements(name):
    op = OPS["rms_norm"]
    has(op, name)
    rows, cols = 2**31 // 4096 + 3, 4096
    if torch.cuda.mem_get_info()[0] < 7 * rows * cols * 2:
        pytest.skip("needs 30 GB of free memory")
    torch.use_deterministic_algorithms(False)
    x = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(cols, device="cuda", dtype=torch.bfloat16)
    args = ((cols,), w, 1e-6, 0.0)
    out = op.backends[name].forward(x, *args)
    dx, dw = op.backends[name].backward(x, x, *args, (True, True))
    for rows_seen in (slice(0, 2), slice(rows - 2, rows)):
        part = x[rows_seen].contiguous()
        assert torch.equal(out[rows_seen], op.backends[name].forward(part, *args))
        alone = op.backends[name].backward(part, part, *args, (True, True))[0]
        assert torch.equal(dx[rows_seen], alone)
    assert dw.isfinite().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_memcheck(name):
    """compute-sanitizer finds no access out of bounds in one odd case, forward and backward."""
    has(OPS["rms_norm"], name)
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    code = f"""
import torch
from fastllm.core.op import OPS
for cols in (33, 256, 1032):
    op = OPS["add_layer_norm"]
    x, w = torch.randn(37, cols, device="cuda"), torch.randn(cols, device="cuda")
    args = (x, x, (cols,), w, w, 1e-5, 0.0)
    out = op.backends["{name}"].forward(*args)
    op.backends["{name}"].backward(x, x, out[1], *args[2:], (True,) * 3)
torch.cuda.synchronize()
"""
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
