"""fake_quantize: dequantize(quantize(x)) bit for bit, with gradients by agreement."""

import itertools

import pytest
import torch

from fastllm import _C
from fastllm.core.op import OPS
from fastllm.ops import quant as ops
from fastllm.ops.quant.cases import FORMATS, fake_cases, learnable
from fastllm.quant import dequantize, fake_quantize, quantize

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
QUICK = [case for case in fake_cases() if "bench" not in case.tags]


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_value_is_that_of_its_code(case):
    x, scales, code, group, symmetric = case.args()
    if scales is None:
        made = ops.quantize(x, code, group, symmetric)
        wanted = ops.dequantize(*made, code, group, x.shape[-1], x.dtype)
    else:  # a kernel and plain torch
        wanted = OPS["fake_quantize"](x, scales, code, group, symmetric, backend="reference")
    assert same(ops.fake_quantize(x, code, group, symmetric, scales), wanted)


@pytest.mark.parametrize("name", ["int8", "int4_asym_g32", "nf4_double", "fp8_block", "mxfp8"])
def test_the_public_function(name):
    x = torch.randn(9, 260, requires_grad=True)
    y = fake_quantize(x, name)
    assert torch.equal(y, dequantize(quantize(x.detach(), name)))
    upstream = torch.randn(9, 260)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("group", [-1, 0, 32, -16])
def test_gradients_of_given_ranges(group, backend):
    """Against autograd through the clipped line, whose rounding is held fixed."""
    x = torch.randn(24, 70, requires_grad=True)
    scales = ops.quantize(x, 0, group)[1].mul(0.6).requires_grad_()
    upstream = torch.randn(24, 70)
    found = torch.autograd.grad(
        ops.fake_quantize(x, 0, group, True, scales, backend=backend), [x, scales], upstream
    )
    each = ops.layout.spread(scales.double(), (24, 70), group)
    inside = (x.double() / each).clamp(-127, 127)
    line = (inside + (inside.round() - inside).detach()) * each
    wanted = torch.autograd.grad(line, [x, scales], upstream.double())
    assert (found[0] == 0).any()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def levels():
    """The instruction set levels, one after the other."""

    def each():
        for name in _C.isa_levels():
            _C.set_isa(name)
            yield name
            assert _C.isa() == name

    before = _C.isa()
    yield each()
    _C.set_isa(before)


@pytest.mark.parametrize("form", [f for f in FORMATS if learnable(f)], ids=str)
def test_codes_in_given_ranges(form, levels):
    """Those of plain torch, bit for bit, and what they stand for is what fake_quantize says."""
    code, group, _ = form
    wide = torch.randn(131, 323) * 3
    for _, dtype in zip(levels, itertools.cycle((FP32, BF16, FP16)), strict=False):
        x = wide.to(dtype)
        scales = ops.quantize(x, code, group)[1] * 0.7
        codes, stored = ops.encode(x, scales, code, group, backend="cpu")
        wanted = ops.encode(x, scales, code, group, backend="torch")
        assert torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        assert torch.equal(stored, scales) and torch.equal(wanted[1], scales)
        values = ops.dequantize(codes, stored, stored[:0], code, group, 323, dtype)
        assert torch.equal(values, ops.fake_quantize(x, code, group, True, scales))


@pytest.mark.parametrize("group", [0, -1, 32, -16])
def test_ranges_of_what_is_no_number_become_nan(group, levels):
    wide = torch.randn(40, 9000)
    scales = ops.quantize(wide, 0, group)[1]
    for (_, bad), dtype in zip(
        zip(levels, itertools.cycle(("nan", "-inf", "inf")), strict=False),
        itertools.cycle((FP16, FP32, BF16)),
        strict=False,
    ):
        x = wide.to(dtype)
        x[33, 8500] = float(bad)
        found = ops.encode(x, scales, 0, group)[1]
        assert found.isnan().sum() == 1
        assert same(found, ops.encode(x, scales, 0, group, backend="torch")[1])


@pytest.mark.parametrize("level", ["scale", "negative"])
def test_scales_of_zero_and_below(level):
    x, upstream = torch.randn(3, 40, requires_grad=True), torch.randn(3, 40)
    scales = torch.zeros(3, 1) if level == "scale" else torch.full((3, 1), -0.01)
    scales.requires_grad_()
    found = []
    for backend in (None, "reference"):
        y = ops.fake_quantize(x, 0, 0, True, scales, backend=backend)
        found.append([y, *torch.autograd.grad(y, [x, scales], upstream)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert bool((found[0][0] == 0).all()) == (level == "scale")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: fake_quantize(x, "mxfp8", s), "scales: expected None for mxfp8"),
        (lambda x, s: fake_quantize(x, "int4_asym_g32", s), "scales: expected None for asym"),
        (lambda x, s: fake_quantize(x, "nf4_double", s), "ranges: expected None"),
        (lambda x, s: fake_quantize(x, "int8", s[:2]), r"scales: expected shape \[4, 1\]"),
        (lambda x, s: fake_quantize(x, "int8", s.int()), "scales: expected a floating"),
        (lambda x, s: fake_quantize(x.int(), "int8"), "tensor: expected a floating"),
        (lambda x, s: ops.encode(x, s, 6, 32), "scales: expected None for mxfp8"),
        (lambda x, s: ops.encode(x, s[:2], 0, 0), r"scales: expected shape \[4, 1\]"),
        (lambda x, s: fake_quantize(x, "int9"), "format"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(4, 64), torch.ones(4, 1))
