"""Additions fused into norms: where, and that nothing else can be told apart."""

import linecache
import traceback

import pytest
import torch
from torch import nn

import fastllm.functional
import fastllm.swap


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(16), nn.RMSNorm(16)
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 16)
        self.pre = True


class PreNorm(Parts):
    def forward(self, x):
        residual = x
        x = self.f(self.norm(x))
        x = residual + x

        residual = x
        x = self.norm2(x)
        x = self.g(x)
        return residual + x


class Nested(Parts):
    def forward(self, x):
        x = x + self.f(self.norm(x))
        x = x + self.g(self.norm2(x))
        return x


class PostNorm(Parts):
    def forward(self, x):
        x = self.norm(x + self.f(x))
        return self.norm2(self.g(x) + x)


class Branched(Parts):
    def forward(self, x, extra=None):
        x = self.f(x) + x
        if extra is not None:
            residual = x
            x = self.g(self.norm(extra))
            x = residual + x
        residual = x
        x = self.norm2(x)
        return residual + self.g(x)


class Flagged(Parts):
    def forward(self, x):
        if self.pre:
            x = x + self.f(self.norm(x))
            return self.norm2(x)
        return self.norm(x + self.f(x))


class Returned(Parts):
    def forward(self, x):
        y = x + self.f(x)
        return self.norm(y), y


class Mangled(Parts):
    __scale = 2.0

    def forward(self, x):
        h = x * self.__scale + self.f(x)
        y = self.norm(h)
        return y + sum(self.norm2(v) for v in (h, y))


class Super(Parts):
    def forward(self, x):
        h = x + self.f(x)
        assert_training = super().train
        return self.norm(h) if assert_training else h


FUSED = [
    (PreNorm, ("norm2",)),
    (Nested, ("norm2",)),
    (PostNorm, ("norm", "norm2")),
    (Branched, ("norm2",)),
    (Flagged, ("norm2",)),
    (Returned, ("norm",)),
    (Mangled, ("norm",)),
]


class Touched(Parts):
    def forward(self, x):
        h = x + self.f(x)
        h.mul_(2)
        return self.norm(h)


class Reassigned(Parts):
    def forward(self, x):
        h = x + self.f(x)
        h = x
        return self.norm(h)


class SumTested(Parts):
    def forward(self, x):
        h = x + self.f(x)
        if h is not None:
            x = h
        return self.norm(h)


class Later(Parts):
    def forward(self, x):
        h = x + self.f(x)
        y = self.g(h) * self.norm(h)
        return y


class InPlace(Parts):
    def forward(self, x):
        y = self.f(x)
        y += x
        return self.norm(y)


class Lambda(Parts):
    def forward(self, x):
        later = lambda y: self.norm(y + y)  # noqa: E731
        return later(x)


NOT_FUSED = [Touched, Reassigned, Later, InPlace, Lambda]


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    for name in ("add_rms_norm", "add_layer_norm"):
        real = getattr(fastllm.functional, name)

        def counted(*args, real=real, **kwargs):
            calls.append(real)
            return real(*args, **kwargs)

        monkeypatch.setattr(fastllm.functional, name, counted)
    return calls


def results(model, *args):
    out = model(*args)
    outs = out if isinstance(out, tuple) else (out,)
    upstream = [torch.randn(o.shape, generator=torch.Generator().manual_seed(2)) for o in outs]
    grads = torch.autograd.grad(outs, list(model.parameters()), upstream, allow_unused=True)
    return [*outs, *[g for g in grads if g is not None]]


def close(a, b):
    return len(a) == len(b) and all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-4) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("block", "norms"), FUSED)
def test_fused(block, norms, fused_calls):
    model, x = block(), torch.randn(3, 5, 16)
    stock = results(model, x)
    handle = fastllm.swap(model)
    (row,) = handle.report().fused
    assert row.new == "addition + " + ", ".join(norms)
    assert close(results(model, x), stock)
    assert len(fused_calls) == len(norms)
    handle.restore()
    assert all(torch.equal(a, b) for a, b in zip(results(model, x), stock, strict=True))


def test_both_branches(fused_calls):
    model, x = Branched(), torch.randn(3, 5, 16)
    stock = results(model, x, x * 2)
    fastllm.swap(model)
    assert close(results(model, x, x * 2), stock)
    assert len(fused_calls) == 1


@pytest.mark.parametrize("block", NOT_FUSED)
def test_not_fused(block, fused_calls):
    model, x = block(), torch.randn(3, 5, 16)
    stock = results(model, x)
    report = fastllm.swap(model).report()
    assert report.count("norm") == 2 and not report.fused
    assert close(results(model, x), stock) and not fused_calls


def test_test_on_the_sum_is_not_moved(fused_calls):
    model, x = SumTested(), torch.randn(3, 5, 16)
    stock = results(model, x)
    assert not fastllm.swap(model).report().fused
    assert close(results(model, x), stock)


def test_decorated_forward_is_left():
    class Decorated(PreNorm):
        @torch.autocast("cpu", enabled=False)
        def forward(self, x):
            x = x + self.f(x)
            return self.norm(x)

    report = fastllm.swap(Decorated()).report()
    (row,) = report.left
    assert "additions not fused: its forward is decorated" in row.reason
    assert report.count("norm") == 2


def make(source, file):
    scope = {"nn": nn, "Parts": Parts, "torch": torch}
    exec(compile(source, file, "exec"), scope)
    return scope["Made"]


SOURCE = """
class Made(Parts):
    def forward(self, x):
        x = x + self.f(x)
        return self.norm(x)
"""


def test_without_source(fused_calls):
    model = make(SOURCE, "<nowhere>")()
    report = fastllm.swap(model).report()
    assert "additions not fused: it has no source" in report.left[0].reason
    model(torch.randn(2, 16))
    assert not fused_calls


def test_source_that_is_not_what_runs(fused_calls):
    """The file was edited after it was imported."""
    file = "<edited>"
    model = make(SOURCE, file)()
    edited = SOURCE.replace("x + self.f(x)", "x + self.g(x)")
    linecache.cache[file] = (len(edited), None, edited.splitlines(True), file)
    report = fastllm.swap(model).report()
    assert "additions not fused: its source is not what runs" in report.left[0].reason
    linecache.cache[file] = (len(SOURCE), None, SOURCE.splitlines(True), file)
    assert fastllm.swap(make(SOURCE, file)()).report().adds == 1


def test_closure_and_defaults():
    scale, ones = 3.0, torch.ones(16)

    class Closed(Parts):
        def forward(self, x, *, shift=ones, times: int = 2):
            x = x * scale + self.f(x) * times
            return self.norm(x) + shift

    model, x = Closed(), torch.randn(3, 16)
    stock = results(model, x)
    assert fastllm.swap(model).report().adds == 1
    assert close(results(model, x), stock)
    scale = 5.0
    moved = results(model, x)
    assert not close(moved, stock), "the closure cell is the original's"


def test_super_call_is_kept(fused_calls):
    model = Super()
    report = fastllm.swap(model).report()
    assert report.count("norm") == 2
    model(torch.randn(2, 16))


def test_traceback_shows_the_original_line():
    model = PreNorm()
    fastllm.swap(model)
    try:
        model(torch.randn(2, 3))
    except ValueError:
        text = traceback.format_exc()
    assert "test_swap_rewrite.py" in text and "x = self.f(self.norm(x))" in text


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_fire(kind, fused_calls):
    model, x = PreNorm(), torch.randn(3, 16)
    fastllm.swap(model)
    seen = []
    hook = getattr(model.norm2, f"register_{kind}_hook")(lambda *a: seen.append(kind))
    results(model, x)
    assert seen == [kind] and not fused_calls
    hook.remove()
    results(model, x)
    assert seen == [kind] and len(fused_calls) == 1


def test_global_hooks_fire(fused_calls):
    model, x = PreNorm(), torch.randn(3, 16)
    fastllm.swap(model)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(m))
    try:
        model(x)
    finally:
        hook.remove()
    assert model.norm2 in seen and not fused_calls


def test_shapes_and_dtypes_that_differ_are_not_fused(fused_calls):
    class Add(Parts):
        def forward(self, a, b):
            return self.norm(a + b)

    model = Add()
    a, b = torch.randn(3, 5, 16), torch.randn(1, 16)
    cases = [(a, b), (a, a.bfloat16()), (a, 1.0), (a.double(), a)]
    stock = [
        model.double()(*c) if c[0].dtype == torch.float64 else model.float()(*c) for c in cases
    ]
    model.float()
    fastllm.swap(model)
    for case, expected in zip(cases, stock, strict=True):
        model.double() if case[0].dtype == torch.float64 else model.float()
        found = model(*case)
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not fused_calls


def test_norm_replaced_after_the_swap(fused_calls):
    model, x = PreNorm(), torch.randn(3, 16)
    fastllm.swap(model)
    model.norm2 = nn.Identity()
    plain = PreNorm()
    plain.norm2 = nn.Identity()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(x), plain(x), rtol=1e-4, atol=1e-4) and not fused_calls


def test_pickled_where_the_source_is_another(monkeypatch):
    """The class is rebuilt without the fusion: slower, and right."""
    file = "<moved>"
    linecache.cache[file] = (len(SOURCE), None, SOURCE.splitlines(True), file)
    kind = make(SOURCE, file)
    from fastllm.swap import classes
    from fastllm.swap.rewrite import FuseAdds

    assert "forward" in vars(classes.make(kind, FuseAdds(("norm",))))
    other = make(SOURCE, "<gone>")
    assert "forward" not in vars(classes.make(other, FuseAdds(("norm",))))
