"""LLM.int8 as the inputs come: columns above `outlier_threshold` in float, for each call anew."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastllm
from fastllm.ops.quant_linear import outliers, quant_linear
from fastllm.quant import Config, QuantLinear
from fastllm.quant import quantize as quantize_tensor
from fastllm.quant.calibrate import sqnr

WIDTH, ROWS = 1024, 256
APART = Config("int8", "int8", outlier_threshold=6.0, min_weights=0)


def planted(tokens, places, width=WIDTH, seed=0):
    """Gaussian inputs, some columns 30 times as large."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[:, places] *= 30
    return x


def pair(config, width=WIDTH, rows=ROWS):
    """(a float layer in a model, its quantized copy)"""
    exact = nn.Sequential(nn.Linear(width, rows, bias=False))
    with torch.no_grad():
        exact[0].weight.normal_(generator=torch.Generator().manual_seed(4))
    made = copy.deepcopy(exact)
    fastllm.quantize(made, config, min_weights=0)
    return exact, made


@pytest.mark.parametrize("tokens", [1, 5, 130])
@torch.no_grad()
def test_error_is_several_times_smaller_wherever_the_outliers_are(tokens):
    exact, apart = pair(APART)
    plain = copy.deepcopy(exact)
    fastllm.quantize(plain, "int8", min_weights=0)
    for places in ([0, 5, 70, 71, 500, 1023], [200, 201, 650]):  # no calibration could know
        x = planted(tokens, places)
        y = exact(x)
        error, before = (float((m(x) - y).norm()) for m in (apart, plain))
        assert error < before / 4
        # of the activations' own error little is left
        assert sqnr(x @ apart[0].dense().t(), apart(x)) > 44.3 - 1


@pytest.mark.parametrize("weights", ["int4_g32", "int4_asym_g64", "int8_g32"])
@torch.no_grad()
def test_other_weights_lose_nothing_to_the_activations(weights):
    x = planted(40, [3, 64, 901])
    q = Config(weights, "int8", outlier_threshold=6.0, min_weights=0)
    _, apart = pair(q)
    _, plain = pair(Config(weights, "int8", min_weights=0))
    plain.load_state_dict({n: t for n, t in apart.state_dict().items() if "threshold" not in n})
    wanted = x @ apart[0].dense().t()
    assert sqnr(wanted, apart(x)) > sqnr(wanted, plain(x)) + 14


@torch.no_grad()
def test_without_outliers_it_is_plain_int8_bit_for_bit():
    _, apart = pair(APART)
    plain = copy.deepcopy(apart)
    plain[0].threshold = 0.0
    x = torch.randn(9, WIDTH).clamp(-6, 6)
    x[3, 4] = -6.0  # at the threshold is not above it
    assert torch.equal(apart(x), plain(x))
    x[3, 4] = -6.01
    assert not torch.equal(apart(x), plain(x))


def test_many_loud_columns_are_taken_in_pieces(monkeypatch):
    x = planted(7, slice(None), width=130)
    q = quantize_tensor(torch.randn(33, 130), "int8")
    given = {"code": 0, "group": 0, "activations": "dynamic", "outlier_threshold": 2.0}
    whole = quant_linear(x, q.codes, q.scales, **given)
    monkeypatch.setattr(outliers, "_BLOCK", 33 * 8)
    assert torch.allclose(quant_linear(x, q.codes, q.scales, **given), whole, rtol=1e-5, atol=1e-3)
    assert sqnr(x @ q.dequantize().t(), whole) > 100  # all of it is float


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [6.0, 6.1, 0.3, 7e4, 1e-9])
def test_the_kernel_finds_the_columns_that_torch_finds(dtype, threshold):
    """Numbers beside the threshold on either side, infinity, NaN, any width."""
    near = torch.tensor([threshold], dtype=torch.float32).to(dtype)
    up, down = (torch.nextafter(near, torch.tensor([v], dtype=dtype)) for v in (1e30, -1e30))
    values = torch.cat([near, -near, up, -up, down, -down, near.new_tensor([0.0, -0.0])])
    values = torch.cat([values, near.new_tensor([float("inf"), float("-inf"), float("nan")])])
    for rows, k in ((1, 1), (1, 11), (70, 1031), (3, 2048)):
        x = torch.zeros(rows, k + 2, dtype=dtype)[:, 1:-1]
        places = torch.randperm(k)[: len(values)]
        x[torch.randint(rows, (len(places),)), places] = values[: len(places)]
        wanted = outliers.loud(x, threshold).nonzero().flatten()
        assert torch.equal(outliers._places(x, threshold), wanted)
        if k > 11:
            assert 5 <= len(wanted) <= 7


@torch.no_grad()
def test_state_dict_copies_and_pickles(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    from safetensors.torch import load_file

    config = Config("int8", "int8", outlier_threshold=6.1, min_weights=0)
    exact, apart = pair(config, 96, 64)
    x = planted(8, [3, 40], 96)
    wanted = apart(x)
    save_file(apart.state_dict(), tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    for fresh in ("int8", config):
        _, other = pair(fresh, 96, 64)
        other.load_state_dict(state)
        assert torch.equal(other(x), wanted) and other[0].threshold == apart[0].threshold
    for twin in (copy.deepcopy(apart), pickle.loads(pickle.dumps(apart))):
        assert torch.equal(twin(x), wanted)
    _, plain = pair("int8", 96, 64)
    other.load_state_dict(plain.state_dict())  # and back: it is the state_dict that says
    assert torch.equal(other(x), plain(x)) and "threshold" not in repr(other)
    apart.load_state_dict(exact.state_dict())  # a float one leaves it as it is
    assert torch.equal(apart(x), wanted) and "outlier_threshold=6.1" in repr(apart)
    half = apart.to(torch.bfloat16)
    assert half[0].outlier_threshold.dtype == torch.float32
    assert sqnr(wanted, half(x.bfloat16()).float()) > 40


def test_restoring_leaves_nothing_of_it():
    model = nn.Sequential(nn.Linear(32, 16))
    before = set(vars(model[0]))
    handle = fastllm.quantize(model, APART)
    assert isinstance(model[0], QuantLinear) and "columns above 6 in float" in str(handle.report())
    handle.restore()
    assert set(vars(model[0])) == before and not list(model.buffers())


def test_static_scales_leave_the_outliers_out():
    x = planted(64, [3, 40], 48)
    exact = nn.Sequential(nn.Linear(48, 32))
    model, plain = copy.deepcopy(exact), copy.deepcopy(exact)
    config = Config("int8", "int8_static", outlier_threshold=6.0, min_weights=0)
    fastllm.quantize(model, config, calibrate=x)
    fastllm.quantize(plain, "int8_static", calibrate=x, min_weights=0)
    assert model[0].act_scale.item() == pytest.approx(6 / 127)
    with torch.no_grad():
        assert (model(x) - exact(x)).norm() < (plain(x) - exact(x)).norm() / 4


def test_compiles_whole_whatever_the_columns():
    torch._dynamo.reset()
    _, model = pair(APART, 96, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for places in ([3, 40], [], [1, 2, 95]):
        x = planted(8, places, 96).requires_grad_()
        upstream = torch.randn(8, 64)
        y, wanted = compiled(x), model(x)
        assert torch.allclose(y, wanted, rtol=1e-4, atol=1e-3)
        (dx,) = torch.autograd.grad(y, x, upstream)
        assert torch.allclose(dx, upstream @ model[0].dense(), rtol=1e-4, atol=1e-3)


def test_gradients_pass_to_adapters_below_and_beside():
    _, model = pair(APART, 96, 64)
    a, b = torch.randn(4, 96, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    x, upstream = planted(16, [3, 40], 96).requires_grad_(), torch.randn(16, 64)
    with torch.no_grad():
        x[2, 7] = float("inf")  # a column in float passes what a float layer does
    (model(x) + x.nan_to_num(posinf=0.0) @ a.t() @ b.t()).backward(upstream)
    dense = model[0].dense()
    wanted = upstream @ (dense + b @ a)
    wanted[2, 7] = (upstream @ dense)[2, 7]
    assert torch.allclose(x.grad, wanted, rtol=1e-4, atol=1e-3)
    assert a.grad.isfinite().all() and b.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outlier_threshold": 0.0}, "outlier_threshold: expected a positive number, found 0.0"),
        ({"outlier_threshold": -6.0}, "outlier_threshold: expected a positive number"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold: expected a positive .* nan"),
        ({"outlier_threshold": float("inf")}, "outlier_threshold: expected a positive .* inf"),
        ({"outlier_threshold": "6"}, "outlier_threshold: expected a positive number, found '6'"),
        ({"outlier_threshold": True}, "outlier_threshold: expected a positive number, found True"),
        ({"outlier_threshold": 6.0, "activations": "float"}, "outlier_threshold: .* found 'float'"),
        ({"outlier_threshold": 6.0, "outliers": 6.0}, "outlier_threshold: .* found both"),
    ],
)
def test_errors_of_the_config_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**({"weights": "int8", "activations": "int8"} | fields))


def test_errors_of_the_op_name_the_argument():
    q = quantize_tensor(torch.randn(8, 64), "int8")
    x, given = torch.randn(2, 64), {"code": 0, "group": 0}
    with pytest.raises(ValueError, match=r"outlier_threshold: .* with float activations"):
        quant_linear(x, q.codes, q.scales, **given, outlier_threshold=6.0)
    for value in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="outlier_threshold: expected 0 or more"):
            quant_linear(
                x, q.codes, q.scales, **given, activations="dynamic", outlier_threshold=value
            )
