"""What was measured to train fastest is what a compiled graph trains on, too."""

import pytest
import torch
import torch.nn.functional as F
from tuner_calls import LAYER, layer_args, say

from fastllm.core.op import OPS


def ops_of(call, args, dynamic=False):
    """The call compiled and differentiated: (names of its graphs' ops, output, gradients)."""
    names, wants = set(), [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def note(graph, inputs):
        names.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(note(g, i)))
    out = torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)(*args)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, wants, torch.randn_like(out)) if wants else ()
    return names, out, grads


def ours(names):
    return any("fastllm" in name for name in names)


def test_a_compiled_call_trains_on_what_trains_fastest(tuned):
    args = layer_args(grad=True)
    kernels, out, grads = ops_of(lambda *a: LAYER(*a), args)
    assert ours(kernels)
    say(LAYER, args, "training", "torch")
    stock, out_too, grads_too = ops_of(lambda *a: LAYER(*a), args)
    assert not ours(stock) and any("layer_norm" in name for name in stock)
    torch.testing.assert_close(out_too, out)
    torch.testing.assert_close(grads_too, grads)
    with torch.no_grad():  # the word was about training
        assert ours(ops_of(lambda *a: LAYER(*a), layer_args())[0])
    say(LAYER, args, "training", "cpu")
    assert ours(ops_of(lambda *a: LAYER(*a), args)[0])


def test_a_forced_backend_stays_forced_in_a_graph(tuned):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch")
    assert ours(ops_of(lambda *a: LAYER(*a, backend="cpu"), args)[0])


def test_an_op_with_hidden_results_trains_on_torch_in_a_graph(tuned):
    op = OPS["attention"]
    case = next(c for c in op.cases if "quick" in c.tags and c.dtype == torch.float32)
    args = tuple(a.requires_grad_() if i in (0, 1, 2) else a for i, a in enumerate(case.args()))
    kernels, out, grads = ops_of(lambda *a: op(*a), args)
    say(op, args, "training", "torch")
    stock, out_too, grads_too = ops_of(lambda *a: op(*a), args)
    assert ours(kernels) and not ours(stock)
    torch.testing.assert_close(out_too, out)
    torch.testing.assert_close(grads_too, grads)


def test_sizes_that_are_symbols_keep_our_op(tuned):
    args = layer_args(grad=True)
    say(LAYER, args, "training", "torch")
    names, out, _ = ops_of(lambda *a: LAYER(*a), args, dynamic=True)
    torch.testing.assert_close(out, F.layer_norm(*args[:5]))
    assert names


@pytest.mark.parametrize("direction", ["training", "forward"])
def test_autocast_follows_the_choice(direction, tuned):
    op, x = OPS["softmax"], torch.randn(4, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = type(op(x, 1).grad_fn).__name__
    say(op, (x, 1), direction, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(x, 1)
    torch.testing.assert_close(out, torch.softmax(x, 1))
    followed = type(out.grad_fn).__name__ == "SoftmaxBackward0"
    assert before != "SoftmaxBackward0" and followed == (direction == "training")
