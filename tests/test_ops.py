"""Every op x backend x CASE against float64, and what every op owes to the rest of torch.

Reads the registry: an op that is added is tested here without a line.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastllm
from fastllm.core.backend import Backend
from fastllm.core.op import OPS, Op, Schema
from fastllm.core.proof import compare, run, standard, wants_grad


def marks(case):
    """The sizes that only the bench needs take seconds each; it proves them before timing them."""
    return [pytest.mark.slow] if "bench" in case.tags and "quick" not in case.tags else []


CASES = [
    pytest.param(op, case, id=f"{op.name}-{case.name}", marks=marks(case))
    for op in OPS.values()
    for case in op.cases
]
SMALL = [
    pytest.param(
        op,
        next(c for c in op.cases if "quick" in c.tags and c.dtype == dtype),
        id=f"{op.name}-{name}",
    )
    for op in OPS.values()
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
]
DOUBLE = [
    pytest.param(op, case, id=f"{op.name}-{case.name}")
    for op in OPS.values()
    for case in op.cases
    # codes pass gradients straight through, which are not those of their steps
    if case.dtype == torch.float64 and op.gradients and op.values is None
]
# what there is to prove of torch's own ops is theirs
KERNELS = [
    op
    for op in OPS.values()
    if op.gradients and set(op.backends) - {"torch", "reference", "triton"}
]
each_op = pytest.mark.parametrize("op", KERNELS, ids=[op.name for op in KERNELS])


def serving(op, args):
    """The backends that can run these arguments here."""
    return [name for name in op.backends if op.why_not(name, args) is None]


def leaves(op, args):
    """The arguments, with gradients wanted for every differentiable tensor."""
    return tuple(
        a.detach().clone().requires_grad_(wants_grad(op, i, a)) if isinstance(a, Tensor) else a
        for i, a in enumerate(args)
    )


def typical(op, dtype=torch.float32):
    """The first small case of a dtype that has every optional argument."""
    return next(
        c
        for c in op.cases
        if c.dtype == dtype
        and "quick" in c.tags
        and all(c.args()[i] is not None for i in op.tensors)
    )


@pytest.mark.parametrize("op, case", CASES)
def test_case_keeps_its_error_budget(op, case):
    held = standard(op, case)
    for name in serving(op, held.args):
        proof = held.prove(name)
        assert proof.ok, f"{name}: {proof.message}"


@pytest.mark.parametrize("op, case", DOUBLE)
def test_gradients_are_those_of_the_function(op, case):
    args = leaves(op, case.args())
    wanted = [a for i, a in enumerate(args) if wants_grad(op, i, a)]

    def call(*tensors):
        given = iter(tensors)
        filled = [next(given) if wants_grad(op, i, a) else a for i, a in enumerate(args)]
        return op(*filled, backend="reference")

    assert torch.autograd.gradcheck(call, wanted)
    assert torch.autograd.gradgradcheck(call, wanted)


@pytest.mark.parametrize("op, case", SMALL)
def test_registration_is_sound(op, case):
    args = leaves(op, case.args())
    torch.library.opcheck(op.packet, (*args, None))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_op
def test_compiles_whole_and_agrees(op, dynamic):
    torch._dynamo.reset()
    args = typical(op).args()
    compiled = torch.compile(
        lambda *a: op(*a), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    eager = run(op, args, None, True)
    given = leaves(op, args)
    outputs = compiled(*given)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = outputs if op.values is None else op.values(args, outputs)
    wanted = [given[i] for i in sorted(op.gradients) if given[i].requires_grad]
    grads = torch.autograd.grad(outputs, wanted, eager.upstream)
    for ours, theirs in zip((*outputs, *grads), eager.tensors, strict=True):
        assert torch.equal(ours, theirs)


@each_op
def test_compiles_with_inductor(op):
    torch._dynamo.reset()
    args = typical(op).args()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True)
    for ours, theirs in zip(_tuple(compiled(*args)), _tuple(op(*args)), strict=True):
        assert torch.equal(ours, theirs)


@each_op
def test_a_compiled_graph_keeps_the_backend_in_force(op):
    torch._dynamo.reset()
    args = typical(op).args()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")
    compiled(*args)
    with fastllm.backend("reference"):
        forced = compiled(*args)
        assert all(
            torch.equal(a, b) for a, b in zip(_tuple(forced), _tuple(op(*args)), strict=True)
        )


@each_op
def test_create_graph_differentiates_twice(op):
    """Gradient penalties need the gradient of the gradient, from a kernel backend, too."""
    args = leaves(op, typical(op).args())
    second = []
    for backend in ("torch", None):
        out = sum(o.square().sum() for o in _tuple(op(*args, backend=backend)))
        (first,) = torch.autograd.grad(out, args[0], create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), args[0])[0])
    torch.testing.assert_close(second[1], second[0], rtol=1e-4, atol=1e-4)


@each_op
def test_functorch_and_forward_mode(op):
    """vmap, jacrev and jvp see plain torch code."""
    args = typical(op).args()

    def of_input(x):
        return _tuple(op(x, *args[1:]))[0]

    x, tangent = args[0], torch.randn_like(args[0])
    _, pushed = torch.func.jvp(of_input, (x,), (tangent,))
    exact = torch.func.jvp(lambda v: _tuple(op.reference(v, *args[1:]))[0], (x,), (tangent,))[1]
    torch.testing.assert_close(pushed, exact, rtol=1e-4, atol=1e-5)
    stacked = torch.stack([args[0], args[0] * 2])
    mapped = torch.func.vmap(of_input)(stacked)
    torch.testing.assert_close(mapped[1], of_input(stacked[1]), rtol=1e-5, atol=1e-5)


@each_op
def test_autocast_gives_stock_dtypes(op):
    args = typical(op).args()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, stock = op(*leaves(op, args)), op(*args, backend="torch")
    for a, b in zip(_tuple(ours), _tuple(stock), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_op
def test_partial_gradients(op):
    """Only some arguments, only some outputs: the gradients are those of the whole."""
    args = typical(op).args()
    whole = leaves(op, args)
    outputs = _tuple(op(*whole))
    upstream = [torch.randn_like(o) for o in outputs]
    wanted = {i: whole[i] for i in sorted(op.gradients) if whole[i].requires_grad}
    for k, output in enumerate(outputs):
        full = torch.autograd.grad(
            output, list(wanted.values()), upstream[k], retain_graph=True, allow_unused=True
        )
        for position, expected in zip(wanted, full, strict=True):
            one = [
                a.detach().requires_grad_(i == position) if isinstance(a, Tensor) else a
                for i, a in enumerate(args)
            ]
            out = _tuple(op(*one))[k]
            if out.requires_grad:
                (got,) = torch.autograd.grad(out, one[position], upstream[k], allow_unused=True)
                if expected is None or got is None:
                    assert not (got if expected is None else expected).abs().max()
                else:
                    assert torch.equal(got, expected)


@each_op
def test_lazy_negation(op):
    """The bytes of a negative view are not its values."""
    args = typical(op).args()
    view = torch._neg_view(-args[0])
    assert view.is_neg() and view.is_contiguous()
    for backend in (None, "reference"):
        for a, b in zip(
            _tuple(op(view, *args[1:], backend=backend)),
            _tuple(op(*args, backend=backend)),
            strict=True,
        ):
            assert torch.equal(a, b)


@each_op
def test_expanded_upstream_gradient(op):
    """`.sum().backward()` sends a gradient of stride 0; `.t()` consumers one that is transposed."""
    args = leaves(op, typical(op).args())
    total = sum(o.sum() for o in _tuple(op(*args)))
    stock = sum(o.sum() for o in _tuple(op(*args, backend="torch")))
    wanted = [args[i] for i in sorted(op.gradients) if args[i].requires_grad]
    for a, b in zip(
        torch.autograd.grad(total, wanted), torch.autograd.grad(stock, wanted), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@each_op
def test_saved_tensors_notice_in_place_writes(op):
    args = leaves(op, typical(op).args())
    x = args[0].clone()
    rest = list(args[1:])
    out = _tuple(op(x, *rest))[0]
    saved = x if op.saved(args, (None, None))[0] is args[0] else None
    if saved is None:
        pytest.skip("keeps an output, not the input")
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@each_op
def test_forced_backend_that_cannot_serve_lists_every_reason(op):
    args = typical(op, torch.float64).args()
    with pytest.raises(fastllm.UnsupportedError) as caught:
        op(*args, backend="cuda")
    for name in op.backends:
        assert f"  {name}:" in str(caught.value)


@each_op
def test_backend_selection(op, monkeypatch):
    args = typical(op).args()
    assert op.select(args).name == "cpu"
    with fastllm.backend("reference"):
        assert op.select(args).name == "reference"
        assert op.select(args, "torch").name == "torch"
        with fastllm.backend("auto"):
            assert op.select(args).name == "cpu"
    with pytest.raises(ValueError, match="backend: expected one of"):
        op(*args, backend="fast")


@each_op
def test_meta_and_fake_tensors(op):
    args = typical(op).args()
    real = _tuple(op(*args))
    meta = _tuple(op(*[a.to("meta") if isinstance(a, Tensor) else a for a in args]))
    for a, b in zip(meta, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        for a, b in zip(_tuple(op(*fakes)), real, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@each_op
def test_wrong_arguments_are_named(op):
    args = list(typical(op).args())
    for position, name in zip(op.tensors, _tensor_names(op), strict=True):
        real = args[position].is_floating_point()
        for wrong in ([1.0], args[position].int() if real else args[position].float()):
            broken = [*args[:position], wrong, *args[position + 1 :]]
            with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
                op(*broken)
        short = args[position][..., :-1].contiguous()
        broken = (*args[:position], short, *args[position + 1 :])
        try:
            out = op(*broken)
        except ValueError as error:
            assert "expected" in str(error)
        else:  # a size that fits nothing else is no error: the function itself must agree
            exact = op.reference(*broken)
            for a, b in zip(_tuple(out), _tuple(exact), strict=True):
                torch.testing.assert_close(a, b)


@given(rows=st.integers(0, 40), cols=st.integers(1, 700), seed=st.integers(0, 99))
def test_any_matrix_matches_stock(rows, cols, seed):
    """Shapes nobody thought of, through the public functions."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, r = (torch.randn(rows, cols, generator=generator) for _ in range(2))
    w, b = (torch.randn(cols, generator=generator) for _ in range(2))
    calls = {
        "rms_norm": (x, (cols,), w, 1e-6, 1.0),
        "layer_norm": (x, (cols,), w, b, 1e-5, 0.0),
        "add_rms_norm": (x, r, (cols,), w, 1e-6, 0.0),
        "add_layer_norm": (x, r, (cols,), w, b, 1e-5, 1.0),
    }
    for name, args in calls.items():
        ours = run(OPS[name], args, None, True)
        stock = run(OPS[name], args, "torch", True, ours.upstream)
        doubled = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
        exact = run(OPS[name], doubled, "reference", True, tuple(u.double() for u in ours.upstream))
        for row in zip(ours.names, ours.tensors, stock.tensors, exact.tensors, strict=True):
            if cols > 1:  # one column: layer_norm's gradient is pure rounding noise
                proof = compare(*row)
                assert proof.ok, f"{name}: {proof.message}"


def _tensor_names(op):
    params = op.schema.params.split(", ")
    return [params[i].split()[-1] for i in op.tensors]


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


class Wrapped(Tensor):
    """A subclass that knows nothing of fastllm, as DTensor or a quantized weight."""


@each_op
def test_tensor_subclasses_keep_their_class(op):
    args = typical(op).args()
    wrapped = args[0].as_subclass(Wrapped)
    found = _tuple(op(wrapped, *args[1:]))
    plain = _tuple(op.reference(wrapped, *args[1:]))
    assert type(found[0]) is Wrapped
    for ours, stock, other in zip(found, _tuple(op(*args)), plain, strict=True):
        assert type(ours) is type(other)  # an output that wrapped does not reach stays plain
        torch.testing.assert_close(ours.as_subclass(Tensor), stock, rtol=1e-5, atol=1e-5)


def test_in_place_ops_bump_the_version(monkeypatch):
    """A kernel's write is invisible to autograd; an op that says it mutates makes it visible."""
    monkeypatch.setattr("fastllm.core.op.OPS", {})

    def scale(input, factor):
        input.detach().numpy()[...] *= factor  # as a kernel does: through the pointer
        return input

    op = Op(
        name="scale_",
        family="toy",
        schema=Schema(
            "Tensor input, float factor", "Tensor", "Tensor grad, float factor", "Tensor"
        ),
        tensors=(0,),
        saved=lambda args, out: (args[1],),
        saved_tensors=(),
        gradients={0: 0},
        check=lambda *_: None,
        fake=lambda input, factor: input,
        fake_backward=lambda factor: (None,),
        reference=scale,
        reference_backward=lambda grad, factor, needs: (grad * factor,),
        implementations=[Backend("reference", scale, lambda grad, factor, needs: (grad * factor,))],
        cost=lambda *_: None,
        mutates=(0,),
    )
    x = torch.ones(3)
    op(x, 2.0)
    assert x._version == 1 and x.tolist() == [2.0] * 3
    leaf = torch.ones(3, requires_grad=True)
    y = leaf * 1.0
    square = y * y
    assert op(y, 3.0).tolist() == [3.0] * 3
    y.sum().backward()
    assert leaf.grad.tolist() == [3.0] * 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
