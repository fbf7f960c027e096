"""sparse_linear and SparseLinear beyond the op's CASES."""

import copy
import io
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm.core.op import OPS
from fastllm.ops.sparse_linear import expand, layout, pack, sparse_linear
from fastllm.quant import SparseLinear, prune, to_dense, to_sparse

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def pruned(n, k, dtype=FP32):
    """A random weight with two zeros in every four neighbours."""
    order = torch.rand(n, -(-k // 4), 4).argsort(-1)
    return (torch.randn(n, k) * max(k, 1) ** -0.5 * (order < 2).flatten(1)[:, :k]).to(dtype)


def model(dim=64):
    """A small pruned network."""
    made = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim, bias=False))
    prune(made, pattern=(2, 4)).finalize()
    return made


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 7, 8, 30, 131])
def test_packing_and_back_is_exact(k):
    weight = pruned(5, k)
    values, kept = pack(weight)
    assert values.shape == (5, 2 * -(-k // 4)) and kept.shape == (5, -(-k // 8))
    assert torch.equal(expand(values, kept, k), weight)


def test_fewer_than_two_of_four_are_packed_too():
    weight = torch.zeros(3, 12)
    weight[1, 5] = 2.0
    values, kept = pack(weight)
    assert torch.equal(expand(values, kept, 12), weight)
    assert all(bin(int(b) & 15).count("1") == 2 for b in kept.flatten())


def test_three_of_four_are_refused():
    with pytest.raises(ValueError, match="weight: expected two zeros in every four"):
        pack(torch.ones(2, 8))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_the_dense_layer_computes(dtype, tokens, threads):
    weight, bias = pruned(70, 131, dtype), torch.randn(70).to(dtype)
    values, kept = pack(weight)
    x = torch.randn(tokens, 131).to(dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = sparse_linear(x, values, kept, None, bias, backend="cpu")
    finally:
        torch.set_num_threads(before)
    exact = F.linear(x.double(), weight.double(), bias.double())
    stock = (F.linear(x, weight, bias) - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * stock + 1e-6


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_int8_products_are_exact(tokens):
    """No saturation: every code and every activation at its largest."""
    n, k = 19, 4096
    weight = torch.full((n, k), 127, dtype=torch.int8)
    weight.view(n, -1, 4)[:, :, 1:3] = 0
    weight[1::2] *= -1
    values, kept = pack(weight)
    y = sparse_linear(
        torch.ones(tokens, k), values, kept, torch.ones(n), activations="dynamic", backend="cpu"
    )
    assert torch.equal(y.round(), weight.double().sum(1).float().expand(tokens, -1))


def test_errors_name_the_argument():
    values, kept = pack(pruned(6, 20))
    x = torch.randn(2, 20)
    for name, call in {
        "values": lambda: sparse_linear(x[:, :9], values, kept),
        "kept": lambda: sparse_linear(x, values, kept[:, :1]),
        "values: expected int8 with": lambda: sparse_linear(x, values, kept, torch.ones(6)),
        "scales": lambda: sparse_linear(x, values.to(torch.int8), kept),
        "bias": lambda: sparse_linear(x, values, kept, None, torch.zeros(7)),
        "activations": lambda: sparse_linear(x, values, kept, activations="dynamic"),
        "format": lambda: to_sparse(model(), "int4"),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}" + ": expected" * (":" not in name)):
            call()


def test_autocast_lowers_what_is_float():
    weight = pruned(12, 32)
    values, kept = pack(weight)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", BF16):
        y = sparse_linear(x, values, kept)
    assert torch.equal(y, sparse_linear(x.bfloat16(), values.bfloat16(), kept))


# ---- modules


@pytest.mark.parametrize("format", ["float", "int8_weight", "int8"])
def test_a_pruned_model_computes_the_same(format):
    made = model()
    x = torch.randn(5, 64)
    wanted, before = made(x), made[0].weight.detach().clone()
    report = to_sparse(made, format)
    assert len(report.quantized) == 2 and type(made[0]) is SparseLinear
    found = made(x)
    error = (found - wanted).norm() / wanted.norm()
    assert error < (1e-6 if format == "float" else 0.02)
    assert report.after < (0.6 if format == "float" else 0.25) * report.before
    assert to_dense(made) is made and type(made[0]) is nn.Linear
    assert (made[0].weight == 0).float().mean() >= 0.5
    if format == "float":
        assert torch.equal(made[0].weight, before) and next(iter(made.state_dict())) == "0.weight"


def test_layers_that_are_not_pruned_are_left_and_the_report_says_so():
    made = model()
    made.append(nn.Linear(64, 8))
    report = to_sparse(made)
    assert type(made[3]) is nn.Linear
    assert "expected two zeros in every four" in report.left[0].reason
    assert "already sparse" in to_sparse(made).left[0].reason


def test_training_keeps_the_zeros():
    torch.manual_seed(0)
    made = model()
    zeros = made[0].weight == 0
    to_sparse(made)
    made.train()
    x, y = torch.randn(64, 64), torch.randn(64, 64)
    optimizer = torch.optim.AdamW(made.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(made(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    to_dense(made)
    assert torch.equal(made[0].weight == 0, zeros)
    assert F.mse_loss(made(x), y).item() < 0.7 * losses[0]


def test_gradients_are_those_of_the_dense_layer():
    weight = pruned(24, 40)
    values, kept = pack(weight)
    x = torch.randn(9, 40)
    grads = []
    for w, run in ((values, lambda a, w: sparse_linear(a, w, kept)), (weight, F.linear)):
        a, w = x.clone().requires_grad_(), w.clone().requires_grad_()
        run(a, w).square().sum().backward()
        grads.append((a.grad, w.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0])
    where = expand(torch.ones_like(values), kept, 40) != 0
    torch.testing.assert_close(expand(grads[0][1], kept, 40), grads[1][1] * where)


@pytest.mark.parametrize("format", ["float", "int8"])
def test_state_dict_copies_and_casts(format, tmp_path):
    from safetensors.torch import load_file, save_file

    made = model()
    dense = copy.deepcopy(made)
    to_sparse(made, format)
    x = torch.randn(4, 64)
    wanted = made(x)
    assert torch.equal(copy.deepcopy(made)(x), wanted)
    save_file(made.state_dict(), tmp_path / "model.safetensors")
    other = to_sparse_of(model(), format)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), wanted)
    again = to_sparse_of(model(), format)
    again.load_state_dict(dense.state_dict())  # of the float model: packed as it is loaded
    assert torch.equal(again(x), wanted)
    full = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))
    with pytest.raises(RuntimeError, match="two zeros in every four"):
        again.load_state_dict(full.state_dict())
    if format == "float":
        full.load_state_dict(fastllm.quant.float_state_dict(made))
        assert torch.equal(full[0].weight, dense[0].weight)
    assigned = copy.deepcopy(made).to("meta")
    assigned.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(assigned.to("cpu")(x), wanted)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), wanted)
    half = made.to(BF16)
    assert half(x.bfloat16()).dtype == BF16 and half[0].weight.dtype == BF16
    assert format == "float" or half[0].scales.dtype == FP32


def to_sparse_of(made, format):
    """The model itself, converted."""
    to_sparse(made, format)
    return made


@pytest.mark.parametrize("format", ["float", "int8"])
def test_compiles_whole(format):
    made = to_sparse_of(model(), format)
    x = torch.randn(3, 64)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    if format == "float":
        compiled(x).sum().backward()
        assert made[0].values.grad is not None


# ---- Triton, ahead of time


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_kernels_compile_everywhere():
    from fastllm.kernels import aot, sparse_matmul
    from fastllm.kernels.aot import meta, record
    from test_triton_compile import TARGETS, ptxas_report
    from triton.backends.compiler import GPUTarget

    n = k = 4096
    kept = meta(n, k // 8, dtype=torch.uint8)
    launches = []
    for m, integer in ((1, False), (64, True), (2048, False)):
        values = meta(n, k // 2, dtype=torch.int8 if integer else BF16)
        x = meta(m, k, dtype=torch.int8 if integer else BF16)
        scales = meta(n) if integer else None
        tokens = meta(m) if integer else None
        call = (sparse_matmul.sparse_matmul, x, values, kept, scales, meta(n, dtype=BF16))
        launches += record(*call, token_scales=tokens, dtype=BF16)
    seen = 0
    for target, limit in TARGETS.items():
        for launch in launches:
            kernel = aot.compile(launch, GPUTarget(*target))
            assert kernel.metadata.shared <= limit, f"{launch} on {target}"
            if target[0] == "cuda":
                spills = ptxas_report(kernel.asm["ptx"], target[1])[1]
            else:
                found = re.search(r"\.vgpr_spill_count: +(\d+)", kernel.asm["amdgcn"])
                spills = int(found[1])
            assert not spills, f"{launch} on {target}: {spills}"
            seen += 1
    assert seen == 3 * len(TARGETS)


def test_forcing_a_backend_that_cannot_says_why():
    values, kept = pack(pruned(6, 20).double())
    with pytest.raises(fastllm.UnsupportedError, match="float64 input"):
        sparse_linear(torch.randn(2, 20).double(), values, kept, backend="cpu")


def test_a_call_under_a_transform_leaves_nothing_behind():
    op = OPS["sparse_linear"]
    args = next(c for c in op.cases if "quick" in c.tags).args()
    torch.func.vjp(lambda x: op(x, *args[1:], backend="reference"), args[0])
    table = layout._places(args[0].device)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
    assert table is not layout._places(args[0].device)  # whoever came first made this one
