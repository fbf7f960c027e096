"""Attention's part of a Llama's training step, stock and swapped. Only with --exhaustive.

The timed calls are those of transformers' attention function, with what autograd does for them in
backward. Run it alone on an idle machine, with -s to see the figures:
    pytest tests/test_swap_step.py --exhaustive -s -n 0
"""

import time
from statistics import median

import pytest
import torch

import fastllm
from fastllm.swap import attention

transformers = pytest.importorskip("transformers")
STEPS, WARM_UP, TOKENS = 8, 2, (4, 512)


class Watch:
    """Seconds of one step spent between the marks."""

    def __init__(self):
        self.seconds, self.begin, self.inside = 0.0, 0.0, False

    def around(self, f, place):
        """`f`, an attention function whose query is argument `place`, with marks around it."""

        def timed(*args, **kwargs):
            if self.inside:  # ours, leaving a call to stock
                return f(*args, **kwargs)
            args = list(args)
            args[place : place + 3] = Before.apply(self, *args[place : place + 3])
            self.inside, begin = True, time.perf_counter()
            out, *rest = f(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            self.inside = False
            return After.apply(self, out), *rest

        return timed


class Before(torch.autograd.Function):
    """Backward comes here when attention's is done."""

    @staticmethod
    def forward(ctx, watch, *tensors):
        ctx.watch = watch
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        ctx.watch.seconds += time.perf_counter() - ctx.watch.begin
        return None, *grads


class After(torch.autograd.Function):
    """And here before it begins."""

    @staticmethod
    def forward(ctx, watch, out):
        ctx.watch = watch
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        ctx.watch.begin = time.perf_counter()
        return None, grad


def llama():
    """32M parameters: hidden 512, 8 layers, 8/4 heads, vocab 8192."""
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()


@pytest.mark.slow
@pytest.mark.parametrize("threads", sorted({1, torch.get_num_threads()}))
def test_attention_of_a_llama_step(threads, monkeypatch):
    torch.set_num_threads(threads)
    watch = Watch()
    table = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    stock = transformers.integrations.sdpa_attention.sdpa_attention_forward
    marked = watch.around(stock, 1)
    monkeypatch.setitem(table._global_mapping, "sdpa", marked)
    monkeypatch.setattr(transformers.integrations.sdpa_attention, "sdpa_attention_forward", marked)
    monkeypatch.setattr(attention, "attend", watch.around(attention.attend, 4))
    models = {"stock": llama(), "swapped": llama()}
    fastllm.swap(models["swapped"])
    found = {name: ([], []) for name in models}
    optimizers = {n: torch.optim.AdamW(m.parameters(), fused=True) for n, m in models.items()}
    for step in range(STEPS):
        ids = torch.randint(0, 8192, TOKENS)
        for name, model in models.items():
            watch.seconds, begin = 0.0, time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[name].step()
            optimizers[name].zero_grad()
            if step >= WARM_UP:
                found[name][0].append(time.perf_counter() - begin)
                found[name][1].append(watch.seconds)
    whole, part = ({n: median(x[i]) * 1e3 for n, x in found.items()} for i in (0, 1))
    assert all(part.values()), "both go through the marks"
    ratio = part["stock"] / part["swapped"]
    for name in models:
        share = part[name] / whole[name]
        print(f"{threads} threads, {name}: step {whole[name]:.0f} ms, attention {part[name]:.0f} ms"
              f" ({share:.0%})")  # fmt: skip
    print(f"attention {ratio:.2f}x, step {whole['stock'] / whole['swapped']:.2f}x")
    assert ratio > 1.0
