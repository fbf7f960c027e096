"""Few queries against many keys: what the CPU kernel that splits the keys has to itself."""

import itertools

import pytest
import torch

from fastllm import _C
from fastllm.core.proof import prove
from fastllm.functional import attention_with_kv_cache, scaled_dot_product_attention
from fastllm.ops.attention import cases, ops

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
