"""swap(fused_loss=True): transformers' labels= path without logits, on this instance only."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fastllm
from fastllm.swap.lazy import LazyLogits, scale_and_cap

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama(tied=False):
    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, tie_word_embeddings=tied))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                   resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )  # fmt: skip


def gemma2():
    return Gemma2ForCausalLM(
        Gemma2Config(**SMALL, **HEADS, head_dim=8, final_logit_softcapping=2.0)
    )


MODELS = {"llama": llama, "tied": lambda: llama(True), "gpt2": gpt2, "gemma2": gemma2}
each_model = pytest.mark.parametrize("name", MODELS)


def batch():
    ids = torch.randint(97, (3, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


def only_loss(model, **options):
    """The model with nothing but its loss swapped."""
    return fastllm.swap(
        model, include=type(model), fused_loss=True, exclude=["*.*", "lm_head"], **options
    )


def step(model, inputs):
    out = model(**inputs, use_cache=False)
    model.zero_grad()
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


@each_model
@pytest.mark.parametrize("items", [None, 19, torch.tensor(19)], ids=str)
def test_loss_and_gradients_are_the_models_own(name, items):
    model, inputs = MODELS[name]().train(), batch()
    if items is not None:
        inputs["num_items_in_batch"] = items
    stock, expected = step(model, inputs)
    with only_loss(model) as handle:
        assert handle.report().count("loss") == 1
        ours, found = step(model, inputs)
        assert isinstance(ours.logits, LazyLogits) and ours.logits.pending
        assert ours.logits.shape == stock.logits.shape and ours.logits.dtype == torch.float32
        assert ours.logits.requires_grad
        torch.testing.assert_close(ours.loss, stock.loss)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours.logits.argmax(-1), stock.logits.argmax(-1))
        assert torch.equal(ours.logits, stock.logits) and not ours.logits.pending
    again, _ = step(model, inputs)
    assert type(again.logits) is torch.Tensor and torch.equal(again.loss, stock.loss)
    assert "forward" not in vars(model.get_output_embeddings())


@each_model
def test_everything_swapped_and_verified(name):
    model, inputs = MODELS[name](), batch()
    handle = fastllm.swap(model, verify=inputs, fused_loss=True)
    assert handle.report().count("loss") == 1, str(handle.report())
    before = type(model)
    handle.restore()
    assert type(model) is not before and not hasattr(type(model), "_fastllm_recipe")


def test_logits_differentiate_and_survive_what_metrics_do():
    model, inputs = llama(), batch()
    stock = model(**inputs).logits
    (expected,) = torch.autograd.grad(stock.square().sum(), model.lm_head.weight)
    only_loss(model)
    lazy = model(**inputs).logits
    (found,) = torch.autograd.grad((lazy**2).sum(), model.lm_head.weight)
    torch.testing.assert_close(found, expected)
    for use in (
        lambda v: v.detach().cpu().numpy().sum(),
        lambda v: v[:, -1].softmax(-1).sum().item(),
        lambda v: torch.cat([v, v]).shape,
        lambda v: len(repr(v)) > 10,
        lambda v: F.cross_entropy(v.view(-1, 97), inputs["input_ids"].view(-1)).item(),
        lambda v: pickle.loads(pickle.dumps(v.detach())).sum().item(),
        lambda v: (v.float() / 2).max().item(),
        lambda v: v.tolist()[0][0][0],
    ):
        assert use(model(**inputs).logits) == pytest.approx(use(stock))
    with torch.no_grad():
        assert not model(**inputs).logits.requires_grad


def test_looking_after_the_optimizers_step_is_an_error_not_another_result():
    model, inputs = llama(), batch()
    only_loss(model)
    out = model(**inputs)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="look at them before the optimizer's step"):
        out.logits.argmax(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_autocast(dtype):
    model, inputs = gemma2().to(dtype), batch()

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            return model(**inputs)

    stock = run()
    only_loss(model)
    ours = run()
    assert ours.loss.dtype == stock.loss.dtype and ours.logits.dtype == stock.logits.dtype
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-2, atol=1e-2)
    assert torch.equal(ours.logits, stock.logits)


def test_generation_and_inference_are_untouched():
    model, inputs = llama().eval(), batch()
    ids = inputs["input_ids"][:1, :4]
    stock = model.generate(ids, max_new_tokens=6, do_sample=False)
    only_loss(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), stock)
    assert type(model(ids).logits) is torch.Tensor


def test_logits_to_keep_shift_labels_and_tuples():
    model, inputs = llama(), batch()
    stock = model(**inputs, return_dict=False)
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    only_loss(model)
    ours = model(**inputs, return_dict=False)
    torch.testing.assert_close(ours[0], stock[0])
    given = model(**inputs, shift_labels=shifted)
    torch.testing.assert_close(given.loss, stock[0])
    positional = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    torch.testing.assert_close(positional.loss, stock[0])


def test_a_loss_or_head_of_the_users_own_goes_the_stock_way():
    model, inputs = llama(), batch()
    only_loss(model)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    assert torch.equal(model(**inputs).loss, model(**inputs).logits.sum())
    del model._loss_function

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head = Doubled(32, 97)
    out = model(**inputs)
    assert type(out.logits) is torch.Tensor
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    report = fastllm.swap(llama_with(model.lm_head), fused_loss=True).report()
    assert any("its head is a Doubled" in row.reason for row in report.left)
    with pytest.raises(ValueError, match="fused_loss: expected a transformers causal LM"):
        fastllm.swap(torch.nn.Linear(3, 3), fused_loss=True)


def llama_with(head):
    model = llama()
    model.lm_head = head
    return model


def test_copies_and_pickles_stay_fused_and_others_stay_stock():
    model, other, inputs = llama(), llama(), batch()
    only_loss(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin(**inputs).logits, LazyLogits)
    assert type(other(**inputs).logits) is torch.Tensor
    assert fastllm.swap.restore(model) == 1
    assert type(model(**inputs).logits) is torch.Tensor


ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "dropout": {"target_modules": ["lm_head"], "lora_dropout": 0.3},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_adapter(kind):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[kind])
    return peft.get_peft_model(llama(), config).train()


def only_its_loss(model):
    return fastllm.swap(
        model, include=LlamaForCausalLM, exclude=["base_model.model.*"], fused_loss=True
    )


def adapter_step(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)  # of the adapter's dropout
    out = model(**inputs, use_cache=False)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_heads_with_adapters_train_as_before(kind):
    model, inputs = with_adapter(kind), batch()
    stock, expected = adapter_step(model, inputs)
    with only_its_loss(model) as handle:
        assert handle.report().count("loss") == 1
        ours, found = adapter_step(model, inputs)
        assert isinstance(ours.logits, LazyLogits) and ours.logits.pending
        torch.testing.assert_close(ours.loss, stock.loss)
        assert any("lm_head" in name for name in found)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        # dropout was drawn once: looking does not draw again
        torch.testing.assert_close(ours.logits + 0, stock.logits)
    assert "forward" not in vars(model.base_model.model.lm_head)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapters_in_low_precision_and_autocast(dtype):
    model, inputs = with_adapter("lora"), batch()
    base = model.base_model.model
    for name, p in base.named_parameters():  # PEFT keeps adapters in float32
        p.data = p.data if "lora_" in name else p.data.to(dtype)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            return model(**inputs)

    stock = run()
    only_its_loss(model)
    ours = run()
    assert isinstance(ours.logits, LazyLogits) and ours.logits.pending
    assert ours.loss.dtype == stock.loss.dtype and ours.logits.dtype == stock.logits.dtype
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-2, atol=1e-2)
    assert torch.equal(ours.logits, stock.logits)


def test_adapters_that_are_off_merged_or_more_than_lora():
    model, inputs = with_adapter("lora"), batch()
    only_its_loss(model)
    head = model.base_model.model.lm_head
    plain = model(**inputs)
    with model.disable_adapter():
        out = model(**inputs)
        assert isinstance(out.logits, LazyLogits) and out.logits.pending
        logits = head.base_layer(out.logits.hidden)[:, :-1].flatten(0, 1)
        torch.testing.assert_close(
            out.loss, F.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
        )
    head.merge()
    merged = model(**inputs)
    assert merged.logits.pending
    torch.testing.assert_close(merged.loss, plain.loss)
    head.unmerge()
    head.lora_B["default"].register_forward_hook(lambda *_: None)
    hooked = model(**inputs)
    assert type(hooked.logits) is torch.Tensor
    torch.testing.assert_close(hooked.loss, plain.loss)


def test_no_logits_are_held():
    config = LlamaConfig(**{**SMALL, "vocab_size": 20000}, **HEADS)
    model, ids = LlamaForCausalLM(config), torch.randint(20000, (4, 64))
    inputs, logits = {"input_ids": ids, "labels": ids}, 4 * 64 * 20000 * 4
    peaks = []
    for ours in (False, True):
        if ours:
            only_loss(model)
        with torch.profiler.profile(profile_memory=True) as log:
            step(model, inputs)
        sizes = [e.cpu_memory_usage for e in log.events()]
        peaks.append(sum(size >= logits for size in sizes))
    assert peaks[0] > 2 and peaks[1] <= 1  # one block of them at most


def test_which_steps_the_fused_loss_knows():
    assert scale_and_cap(()) == (1.0, 0.0)
    assert scale_and_cap((("div", 4.0), ("float", None))) == (0.25, 0.0)
    assert scale_and_cap((("div", 30.0), ("tanh", None), ("mul", 30.0))) == (1.0, 30.0)
    assert scale_and_cap((("tanh", None), ("tanh", None))) is None
