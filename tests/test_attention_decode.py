"""Few queries against many keys: what the CPU kernel that splits the keys has to itself."""

import itertools

import pytest
import torch

from fastllm import _C
from fastllm.core.proof import prove
from fastllm.functional import attention_with_kv_cache, scaled_dot_product_attention
from fastllm.ops import quant
from fastllm.ops.attention import cases, ops
from fastllm.ops.attention.quantized import Codes
from fastllm.quant.formats import parse

# across two borders of what a task reads, with widths that fill no vector
SIZES = (1, 4, 2, 3, 1100, 40, 72)


@pytest.fixture(params=_C.isa_levels())
def level(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def _dense():
    options = itertools.cycle(cases.OPTIONS)
    for mask, dtype in zip(cases.MASKS, itertools.cycle(cases.DTYPES)):
        yield cases._case(SIZES, dtype, mask, next(options))


def _cached():
    for (page, option), dtype in itertools.product(((0, "all"), (48, "window")), cases.DTYPES):
        yield cases._cached((2, 6, 2, 2, 1100, 40, 72, page), dtype, option)


@pytest.mark.parametrize("case", list(_dense()), ids=lambda c: c.name)
def test_every_mask_across_tasks(case, level):
    made = prove(ops.attention_op, case, "cpu", backward=False)
    assert made.ok, made.message


@pytest.mark.parametrize("case", list(_cached()), ids=lambda c: c.name)
def test_every_cache_across_tasks(case, level):
    made = prove(ops.attention_cache_op, case, "cpu")
    assert made.ok, made.message


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("forms", cases.CODED[:5], ids=str)
def test_codes_across_tasks(forms, dtype, level):
    """More rows than a block of queries has, by a width that fills no vector of bytes."""
    for sizes in ((1, 5, 1, 2, 1100, 136, 72, 0), (2, 6, 2, 1, 600, 128, 128, 48)):
        case = cases.coded(cases._cached(sizes, dtype, "sinks"), *forms)
        made = prove(ops.attention_quantized_op, case, "cpu")
        assert made.ok, made.message


@pytest.mark.parametrize("name", ["int8", "int4_row", "int4_asym_g32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_that_is_no_number_stays_in_its_sequence(name, dtype, level):
    k, v = torch.randn(3, 2, 70, 64), torch.randn(3, 2, 70, 64)
    k[0, 1, 3], v[1, 0, 4] = torch.nan, torch.inf
    query, used = torch.randn(3, 4, 1, 64).to(dtype), torch.full((3,), 70, dtype=torch.int32)
    form = parse(name)
    caches = []
    for x in (k, v):
        codes, scales, zeros = quant.quantize(x, form.code, form.group, form.symmetric)
        zeros = None if form.symmetric else zeros
        caches.append(Codes(codes, scales, zeros, form.code, form.group, 64))
    out = attention_with_kv_cache(query, *caches, used, backend="cpu")
    lost = out.isnan().any(-1).flatten(1)
    assert lost.tolist() == [[False, False, True, True], [True, True, False, False], [False] * 4]


def test_threads_change_nothing(level):
    q, k, v = (torch.randn(1, h, t, 64) for h, t in ((8, 1), (2, 1500), (2, 1500)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(scaled_dot_product_attention(q, k, v, enable_gqa=True, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_sequences_of_a_batch_do_not_touch_each_other(level):
    """An empty one, one that ends inside a task, and a full one, with NaN behind each end."""
    q, k, v = (torch.randn(3, h, t, 32) for h, t in ((4, 1), (2, 700), (2, 700)))
    lengths = torch.tensor([0, 515, 700], dtype=torch.int32)
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = torch.nan
    out = attention_with_kv_cache(q, k, v, lengths, backend="cpu")
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    for b in (1, 2):
        n = int(lengths[b])
        alone = scaled_dot_product_attention(
            q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], enable_gqa=True, backend="cpu"
        )
        assert torch.equal(out[b : b + 1], alone)


@pytest.mark.parametrize(
    "sizes, stock",
    [
        ((1, 32, 8, 1, 4096, 128), False),
        ((1, 1, 1, 1, 32768, 128), False),
        ((1, 8, 8, 1, 256, 64), True),
        ((1, 8, 8, 16, 4096, 64), True),
    ],
    ids=str,
)
def test_few_queries_run_where_that_was_measured_faster(sizes, stock):
    b, h, g, t, s, d = sizes
    q, k = torch.empty(b, h, t, d), torch.empty(b, g, s, d)
    rest = (None, None, None, None, 0.0, 1.0, -1, -1, 0, 0.0)
    assert ops._stock_first(False, q, k, k, *rest) is stock
