"""fastllm.nn: torch's modules in all but the code that runs."""

import copy
import pickle

import pytest
import torch

from fastllm import nn as fast

PAIRS = [
    (torch.nn.LayerNorm, fast.LayerNorm, ((12,),), {}),
    (torch.nn.LayerNorm, fast.LayerNorm, ([3, 12],), {"eps": 1e-3, "bias": False}),
    (torch.nn.LayerNorm, fast.LayerNorm, (12,), {"elementwise_affine": False}),
    (torch.nn.RMSNorm, fast.RMSNorm, (12,), {}),
    (torch.nn.RMSNorm, fast.RMSNorm, ((3, 12), 1e-3), {"dtype": torch.bfloat16}),
    (torch.nn.RMSNorm, fast.RMSNorm, (12,), {"elementwise_affine": False}),
    (torch.nn.GroupNorm, fast.GroupNorm, (2, 4), {}),
    (torch.nn.GroupNorm, fast.GroupNorm, (4, 4, 1e-3), {"affine": False}),
    (torch.nn.Linear, fast.Linear, (12, 7), {}),
    (torch.nn.Linear, fast.Linear, (12, 7), {"bias": False, "dtype": torch.bfloat16}),
    (torch.nn.GELU, fast.GELU, (), {}),
    (torch.nn.GELU, fast.GELU, ("tanh",), {}),
    (torch.nn.SiLU, fast.SiLU, (), {}),
]


IDS = [f"{stock.__name__}{args}{kwargs}" for stock, _, args, kwargs in PAIRS]


def pair(stock, ours, args, kwargs):
    a, b = stock(*args, **kwargs), ours(*args, **kwargs)
    with torch.no_grad():
        for p in a.parameters():
            p.copy_(torch.randn(p.shape))
    b.load_state_dict(a.state_dict())
    return a, b


@pytest.mark.parametrize(("stock", "ours", "args", "kwargs"), PAIRS, ids=IDS)
def test_is_the_original_to_everybody(stock, ours, args, kwargs):
    a, b = pair(stock, ours, args, kwargs)
    assert repr(a) == repr(b) and isinstance(b, stock)
    assert vars(a).keys() == vars(b).keys()
    assert list(a.state_dict()) == list(b.state_dict())
    for twin in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        assert type(twin) is ours
        pairs = zip(twin.parameters(), b.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(("stock", "ours", "args", "kwargs"), PAIRS, ids=IDS)
def test_forward_and_gradients(stock, ours, args, kwargs):
    a, b = pair(stock, ours, args, kwargs)
    dtype = kwargs.get("dtype", torch.float32)
    x = torch.randn(5, 4, 3, 12, dtype=dtype)
    close = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    results = []
    for module in (a, b):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], upstream)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine, theirs, **close)


@pytest.mark.parametrize(("stock", "ours"), [PAIRS[0][:2], PAIRS[3][:2]])
def test_add_is_forward_of_the_sum(stock, ours):
    module = pair(stock, ours, (12,), {})[1]
    a, b = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    output, total = module.add(a, b)
    assert torch.equal(total, a + b)
    assert torch.allclose(output, module(a + b), rtol=1e-5, atol=1e-6)


def test_backend_is_a_class_attribute():
    class Forced(fast.RMSNorm):
        backend = "nonsense"

    with pytest.raises(ValueError, match="backend"):
        Forced(12)(torch.randn(2, 12))


def test_nested_tensors_run_as_in_torch():
    module = fast.LayerNorm(12)
    nested = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)])
    stock = torch.nn.LayerNorm(12)(nested)
    for mine, theirs in zip(module(nested).unbind(), stock.unbind(), strict=True):
        assert torch.equal(mine, theirs)


def test_symbolic_tracing():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = fast.RMSNorm(12)

        def forward(self, x):
            return self.norm(x)

    model = Model()
    x = torch.randn(2, 12)
    assert torch.allclose(torch.fx.symbolic_trace(model)(x), model(x), rtol=1e-5, atol=1e-6)
