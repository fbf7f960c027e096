"""Activations, rotary embedding and embedding: what is special to them beyond their CASES."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastllm import _C
from fastllm import functional as ours
from fastllm.core.op import OPS
from fastllm.core.proof import prove
from fastllm.ops.dropout import reference as dropout

LEVELS = _C.isa_levels()
OF_CPU = (
    "silu",
    "gelu",
    "relu2",
    "swiglu",
    "geglu",
    "rotary_embedding",
    "embedding",
    "dropout_add",
)
QUICK = [(n, c) for n in OF_CPU for c in OPS[n].cases if "bench" not in c.tags]


@pytest.fixture(params=LEVELS)
def level(request):
    """Runs the test at this level and proves afterwards that it did."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    assert _C.isa() == request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "case"), QUICK, ids=[f"{n}-{c.name}" for n, c in QUICK])
def test_every_level_keeps_the_budget(level, name, case):
    op = OPS[name]
    if op.why_not("cpu", case.args()) is None:
        proof = prove(op, case, "cpu")
        assert proof.ok, proof.message


# ---- activations

EDGES = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-39,
    1e-20,
    0.5,
    -0.5,
    5.0,
    -5.0,
    -12.0,
    1e4,
    -1e4,
    88.8,
    -88.8,
]
EXACT = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * torch.erfc(x * -(0.5**0.5)),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("name", EXACT)
def test_values_are_exact_to_a_few_ulp(level, name):
    """Near 0 and far out, where an error relative to the largest element says nothing."""
    x = torch.cat([torch.tensor(EDGES), torch.linspace(-12, 12, 5001), torch.randn(300) * 1e-3])
    value, exact = getattr(ours, name)(x), EXACT[name](x.double())
    ulp = torch.finfo(torch.float32).eps * exact.abs() + 2.0**-149
    assert ((value - exact).abs() <= 8 * ulp).all()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_infinities_and_nan_are_those_of_the_formula(level, name, dtype):
    """torch's own GELU makes NaN of inf, which has a limit."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan")] * 9, dtype=dtype)
    exact = OPS[name].reference(x.double(), *["none"] * (name == "gelu"))
    assert exact[0] == float("inf")
    torch.testing.assert_close(getattr(ours, name)(x), exact.to(dtype), equal_nan=True)


@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    cols=st.integers(1, 300),
    gap=st.integers(0, 3),
    tanh=st.booleans(),
)
def test_any_shape_and_row_distance(lead, cols, gap, tanh):
    """Two views of one tensor: their gradients are two tensors, and add up in the whole."""
    wide = torch.randn(*lead, 2 * cols + gap, requires_grad=True)
    gate, up = wide[..., :cols], wide[..., cols + gap :]
    form = "tanh" if tanh else "none"
    value, stock = ours.geglu(gate, up, form), F.gelu(gate, approximate=form) * up
    torch.testing.assert_close(value, stock)
    upstream = torch.randn_like(value)
    (grad,), (wanted,) = (torch.autograd.grad(v, wide, upstream) for v in (value, stock))
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_halves_of_a_projection_are_not_copied():
    from fastllm.ops.activation.layout import as_rows

    gate, up = torch.randn(2, 3, 16).chunk(2, -1)
    (a, b), rows, cols, steps = as_rows(gate, up)
    assert (a.data_ptr(), b.data_ptr()) == (gate.data_ptr(), up.data_ptr())
    assert (rows, cols, steps) == (6, 8, [16, 16])


def test_threads_do_not_change_a_bit():
    gate, up = torch.randn(2, 700, 513).unbind()
    one = ours.swiglu(gate, up)
    torch.set_num_threads(4)
    assert torch.equal(ours.swiglu(gate, up), one)


def test_wrong_form_is_named():
    with pytest.raises(ValueError, match="approximate: expected 'none' or 'tanh', found 'erf'"):
        ours.gelu(torch.randn(3), "erf")


# ---- rotary


def tables(length, width, dtype=torch.float32):
    angles = torch.rand(length, width // 2) * 6
    both = torch.cat([angles, angles], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def test_rotary_is_that_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    cohere = pytest.importorskip("transformers.models.cohere.modeling_cohere")
    config = llama.LlamaConfig(hidden_size=128, num_attention_heads=4)
    query = torch.randn(2, 6, 4, 32).transpose(1, 2)
    key = torch.randn(2, 6, 2, 32).transpose(1, 2)
    places = torch.arange(6).repeat(2, 1) + torch.tensor([[0], [5]])
    cos, sin = llama.LlamaRotaryEmbedding(config)(query, places)
    wanted = llama.apply_rotary_pos_emb(query, key, cos, sin)
    for a, b in zip(ours.rotary_embedding(query, key, cos, sin), wanted, strict=True):
        torch.testing.assert_close(a, b)
    cos, sin = (t[..., :16].repeat_interleave(2, -1) for t in (cos, sin))
    wanted = cohere.apply_rotary_pos_emb(query, key, cos, sin)
    found = ours.rotary_embedding(query, key, cos, sin, interleaved=True)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_rotary_positions_and_half_tables():
    query, key = torch.randn(2, 4, 5, 24), torch.randn(2, 1, 5, 24)
    cos, sin = tables(40, 16)
    places = torch.randint(0, 40, (2, 5))
    wanted = ours.rotary_embedding(query, key, cos[places], sin[places])
    picked = ours.rotary_embedding(query, key, cos, sin, position_ids=places)
    half = ours.rotary_embedding(
        query, key, cos[:, :8], sin[:, :8], position_ids=places, rotary_dim=16
    )
    for a, b, c in zip(wanted, picked, half, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert torch.equal(a[..., 16:], (query if a is wanted[0] else key)[..., 16:])
    with pytest.raises(IndexError):
        ours.rotary_embedding(query, key, cos, sin, position_ids=places + 40)
    with pytest.raises(ValueError, match="position_ids: expected"):
        ours.rotary_embedding(query, key, cos, sin, position_ids=places.float())


def test_rotary_tables_may_learn():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    cos, sin = (t.requires_grad_() for t in tables(5, 8))
    out = ours.rotary_embedding(query, key, cos, sin)
    assert all(
        g.abs().sum() > 0 for g in torch.autograd.grad(sum(o.sum() for o in out), (cos, sin))
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_in_place(interleaved):
    fused = torch.randn(2, 5, 3, 4, 16)  # [B, T, (q, k, v), H, D]
    before = fused.clone()
    query, key, _ = (t.transpose(1, 2) for t in fused.unbind(2))
    cos, sin = tables(5, 12)
    wanted = ours.rotary_embedding(query, key, cos, sin, interleaved=interleaved)
    versions = query._version, key._version
    found = ours.rotary_embedding_(query, key, cos, sin, interleaved=interleaved)
    assert found[0] is query and found[1] is key
    assert query._version > versions[0] and key._version > versions[1]
    assert torch.equal(query, wanted[0]) and torch.equal(key, wanted[1])
    assert torch.equal(fused[:, :, 2], before[:, :, 2])  # the values next to them


def test_rotary_in_place_and_autograd():
    leaf = torch.randn(1, 2, 5, 8, requires_grad=True)
    cos, sin = tables(5, 8)
    key = torch.randn(1, 1, 5, 8)
    grads = []
    for call in (ours.rotary_embedding, ours.rotary_embedding_):
        out = call(leaf * 1.0, key.clone(), cos, sin)[0]
        grads.append(torch.autograd.grad(out, leaf, torch.ones_like(out))[0])
    assert torch.equal(*grads)
    square = (y := leaf * 1.0) * y
    ours.rotary_embedding_(y, key.clone(), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with pytest.raises(ValueError, match="query: expected memory of its own"):
        ours.rotary_embedding_(torch.randn(1, 1, 5, 8).expand(1, 2, 5, 8), key, cos, sin)


# ---- embedding


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_embedding_refuses_an_index_out_of_range(bad):
    index = torch.tensor([0, bad])
    with pytest.raises(IndexError, match=rf"input: expected indices of 0 to 9, found {bad}"):
        ours.embedding(index, torch.randn(10, 4))


@pytest.mark.parametrize("options", [{"padding_idx": -2}, {"max_norm": 1.0, "norm_type": 1.0}, {}])
def test_embedding_is_that_of_torch(options):
    index = torch.randint(0, 20, (3, 30))
    for scale in (False, True):
        results = []
        for call in (ours.embedding, F.embedding):
            torch.manual_seed(1)
            weight = torch.randn(20, 33, requires_grad=True)
            out = call(index, weight, scale_grad_by_freq=scale, **options)
            upstream = torch.randn_like(out)
            results.append((out, weight, torch.autograd.grad(out, weight, upstream)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_embedding_sparse_and_errors():
    weight = torch.randn(6, 3, requires_grad=True)
    ours.embedding(torch.tensor([1, 1]), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    with pytest.raises(ValueError, match="padding_idx: expected -6 to 5, found 6"):
        ours.embedding(torch.tensor([1]), weight, 6)


def test_embedding_weight_may_change_before_backward():
    weight = torch.randn(6, 3, requires_grad=True)
    out = ours.embedding(torch.tensor([1, 1, 4]), weight)
    with torch.no_grad():
        weight.add_(1)
    out.sum().backward()
    assert weight.grad[:, 0].tolist() == [0, 2, 0, 0, 1, 0]


def test_embedding_gradient_is_deterministic_and_exact():
    """One index thousands of times: threads share it by columns, sums stay in float32."""
    index = torch.randint(0, 50, (8000,)).clamp(min=40) - 40
    dy = torch.randn(8000, 1100).bfloat16()
    weight = torch.zeros(10, 1100, dtype=torch.bfloat16, requires_grad=True)
    found = []
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(ours.embedding(index, weight), weight, dy)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    exact = torch.zeros(10, 1100, dtype=torch.float64).index_add(0, index, dy.double())
    assert (found[0].double() - exact).abs().max() <= exact.abs().max() * 2**-8


@given(rows=st.integers(1, 40), cols=st.integers(0, 70), count=st.integers(0, 60))
def test_any_embedding(rows, cols, count):
    index, weight = torch.randint(0, rows, (count,)), torch.randn(rows, cols, requires_grad=True)
    out = ours.embedding(index, weight)
    assert torch.equal(out, weight[index])
    dy = torch.randn_like(out)
    wanted = torch.autograd.grad(weight[index], weight, dy)[0]
    torch.testing.assert_close(torch.autograd.grad(out, weight, dy)[0], wanted)


# ---- dropout_add


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_independently(p):
    """Of 2^18 elements in several rows of the mask; neighbours say nothing about each other."""
    torch.manual_seed(3)
    x = torch.ones(8, 1 << 15)
    kept = ours.dropout_add(x, torch.zeros_like(x), p)
    assert set(kept.unique().tolist()) == {0.0, kept.max().item()}
    assert kept.max().item() == pytest.approx(1 / (1 - p))
    mask = (kept > 0).double() - (1 - p)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item()) < 4 * deviation
    for one, other in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1])):
        assert abs((one * other).mean().item()) < 4 * p * (1 - p) / one.numel() ** 0.5


def test_dropout_follows_the_generator_and_checkpoints():
    x, residual = torch.randn(2, 5, 40, requires_grad=True), torch.randn(2, 5, 40)
    torch.manual_seed(5)
    first, other = (ours.dropout_add(x, residual, 0.3) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(ours.dropout_add(x, residual, 0.3), first) and not torch.equal(first, other)
    (plain,) = torch.autograd.grad(first.square().sum(), x)
    torch.manual_seed(5)
    again = torch.utils.checkpoint.checkpoint(
        ours.dropout_add, x, residual, 0.3, use_reentrant=False
    )
    (found,) = torch.autograd.grad(again.square().sum(), x)
    assert torch.equal(found, plain)
    assert torch.equal(ours.dropout_add(x, residual, 0.3, False), residual + x)
    with pytest.raises(ValueError, match=r"p: expected 0 to 1, found 1\.5"):
        ours.dropout_add(x, residual, 1.5)


def test_dropout_takes_mixed_dtypes_and_stores_no_mask():
    x = torch.randn(64, 1000, dtype=torch.bfloat16, requires_grad=True)
    residual, seed = torch.randn(64, 1000), torch.tensor([7])
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, _same):
        out = ours.dropout_add(x, residual, 0.25, seed=seed)
    assert out.dtype == torch.float32 and sum(stored) <= 1
    kept = dropout.kept(seed, x.shape, 0.25)
    assert torch.equal(out == residual, ~kept | (x == 0))
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found, torch.where(kept, 4 / 3, 0.0).to(torch.bfloat16))


def _same(tensor):
    return tensor


def test_dropout_compiles_whole_and_draws_anew():
    torch._dynamo.reset()
    x, residual = torch.randn(6, 40), torch.randn(6, 40)
    compiled = torch.compile(ours.dropout_add, fullgraph=True, backend="aot_eager")
    first, other = compiled(x, residual, 0.5), compiled(x, residual, 0.5)
    assert not torch.equal(first, other)
    gone = (first == residual).float().mean().item()
    assert 0.3 < gone < 0.7
