"""fake_quantize: dequantize(quantize(x)) bit for bit, with gradients by agreement."""

import pytest
import torch

from fastllm.core.op import OPS
from fastllm.ops import quant as ops
from fastllm.ops.quant.cases import fake_cases
from fastllm.quant import dequantize, fake_quantize, quantize

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
        (lambda x, s: fake_quantize(x, "int9"), "format"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(torch.randn(4, 64), torch.ones(4, 1))
