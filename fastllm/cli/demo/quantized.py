"""Fifth part: the real encoder in int8, and the trained Llama in int8, int4 and nf4.

    python -m fastllm.cli.demo.quantized

Losses are those of text that nobody was trained on. Training with quantization in the loop starts
from the trained model; beside it, the float model gets as many steps more, so that what is
compared is the rounding and nothing else.
"""

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.cli.demo import encoder
from fastllm.cli.demo.llama import Size, Trainer, batch_of, held_out
from fastllm.cli.demo.text import batches, sentences
from fastllm.core.measure import Measurement, Ratio, interleave
from fastllm.quant.models import quantize
from fastllm.quant.qat import convert_qat, prepare_qat
from fastllm.quant.report import nbytes
from fastllm.swap.engine import swap_model as swap

FLOAT, QUANTIZED = "float32", "int8"
FORMATS = ("int8", "int4", "nf4")
LONGER, ROUNDED, TRAINED = "float32, trained on", "int4, then rounded", "int4, trained so"
_FIRST = 200_000  # the first batch of the steps that follow: none that was seen


@dataclass(frozen=True)
class EncoderResult:
    """Sentences/s and cosines to the float embeddings."""

    speed: dict[str, float]
    speedup: Ratio
    cosines: list[float]
    report: Any


@dataclass(frozen=True)
class LlamaResult:
    """Held-out losses, bytes of the model and tokens/s of scoring text, by format."""

    losses: dict[str, float]
    sizes: dict[str, int]
    speed: dict[str, float]
    speedup: dict[str, Ratio]
    steps: int

    @property
    def recovered(self) -> float:
        """The share of int4's loss that training with it recovers; NaN where nothing was lost."""
        lost = self.losses[ROUNDED] - self.losses[LONGER]
        return (self.losses[ROUNDED] - self.losses[TRAINED]) / lost if lost > 0 else math.nan


@dataclass(frozen=True)
class QuantizedResult:
    """Both halves of the part."""

    encoder: EncoderResult
    llama: LlamaResult


def compare(
    size: Size,
    model: Any,
    count: int,
    batch: int,
    steps: int,
    seconds: float,
    device: str = "cpu",
    tick: Callable[[float], Any] | None = None,
) -> QuantizedResult:
    """Measures both; `model` is the trained Llama of that size, and stays as it is."""
    first = compare_encoders(count, batch, 0.5 * seconds, device, tick)
    return QuantizedResult(first, compare_llamas(size, model, steps, 0.5 * seconds, device))


def compare_encoders(
    count: int, batch: int, seconds: float, device: str, tick: Callable[[float], Any] | None = None
) -> EncoderResult:
    """Encodes the same sentences in turns: in float32 as it came; quantized and swapped, where it
    skips the padding of a batch.
    """
    model, tokenizer = encoder.load(device)
    stock = copy.deepcopy(model)
    groups = batches(sentences(count), batch)
    inputs = [
        tokenizer(g, padding=True, truncation=True, max_length=256, return_tensors="pt").to(device)
        for g in groups
    ]
    handle = quantize(model, QUANTIZED, progress=False)
    swap(model, unpad=True)
    models = {FLOAT: stock, QUANTIZED: model}
    found = interleave(
        {name: encoder._factory(m, inputs) for name, m in models.items()},
        sets=len(inputs),
        device=device,
        budget=seconds,
        min_rounds=len(inputs),
        max_rounds=1_000_000,
        stable=0.002,
        paired=True,
        tick=tick,
    )
    if found.failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in found.failed.items()))
    total = sum(len(i["input_ids"]) for i in inputs)
    cosines = [
        c
        for given in inputs
        for c in F.cosine_similarity(
            encoder.embed(model, given).double(), encoder.embed(stock, given).double()
        ).tolist()
    ]
    speed = {n: total / encoder._pass_seconds(found, n, len(inputs)) for n in models}
    speedup = encoder.pass_speedup(found, QUANTIZED, FLOAT, len(inputs))
    return EncoderResult(speed, speedup, cosines, handle.report())


def compare_llamas(
    size: Size, model: Any, steps: int, seconds: float, device: str = "cpu"
) -> LlamaResult:
    """The trained model in every format; then int4 with training, and the float model with it.

    All of its layers are quantized, the small ones too: this is about what is lost.
    """
    text = held_out(size, device)
    models = {FLOAT: copy.deepcopy(model).eval()}
    for name in FORMATS:
        models[name] = copy.deepcopy(models[FLOAT])
        quantize(models[name], name, progress=False, min_weights=0)
    losses = {name: loss_of(m, text) for name, m in models.items()}
    sizes = {name: nbytes(m) for name, m in models.items()}
    found = score_in_turns(models, text[: size.batch], 0.4 * seconds)
    count = text[: size.batch].numel()
    speed = {name: count / found.seconds(name) for name in models}
    speedup = {name: found.speedup(name, over=FLOAT) for name in FORMATS}
    del models
    longer, student = (copy.deepcopy(model) for _ in range(2))
    prepare_qat(student, "int4", min_weights=0)
    done = train_on(size, [longer, student], steps, 0.6 * seconds, device)
    losses[LONGER] = loss_of(longer.eval(), text)
    quantize(longer, "int4", progress=False, min_weights=0)
    losses[ROUNDED] = loss_of(longer, text)
    convert_qat(student.eval())
    losses[TRAINED] = loss_of(student, text)
    return LlamaResult(losses, sizes, speed, speedup, done)


@torch.no_grad()
def loss_of(model: Any, text: Tensor) -> float:
    """The mean loss a token of `text` [rows, length]."""
    parts = text.split(16)
    losses = [model(input_ids=p, labels=p, use_cache=False).loss.double() * len(p) for p in parts]
    return float(sum(losses) / len(text))


def score_in_turns(models: dict[str, Any], text: Tensor, seconds: float) -> Measurement:
    """Times the logits of `text`, every model in turn."""

    def factory(model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def call(i: int) -> Any:
            return model(input_ids=text, use_cache=False).logits

        return lambda: call

    found = interleave(
        {name: factory(m) for name, m in models.items()}, device=text.device, budget=seconds
    )
    if found.failed:
        raise RuntimeError("; ".join(f"{name}: {why}" for name, why in found.failed.items()))
    return found


def train_on(size: Size, models: list[Any], steps: int, seconds: float, device: str) -> int:
    """Trains the models further on the same batches, at a tenth of the rate that decays."""
    optimizers = [torch.optim.AdamW(m.train().parameters(), lr=2e-4, fused=True) for m in models]
    begin = time.perf_counter()
    for step in range(steps):
        if time.perf_counter() - begin > seconds and step >= 5:
            return step
        ids = batch_of(size, _FIRST + step, device)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 2e-4 * (1 - step / steps)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return steps


def rows(found: QuantizedResult) -> list[tuple[str, str, str, str]]:
    """The figures as text: what, float32, quantized, ratio."""
    first, second = found.encoder, found.llama
    mean, least = sum(first.cosines) / len(first.cosines), min(first.cosines)
    ratio = first.speedup
    made = [
        (
            "encoder in int8, sentences/s",
            f"{first.speed[FLOAT]:.0f}",
            f"{first.speed[QUANTIZED]:.0f}",
            f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})",
        ),
        ("  cosine to float32, mean / min", "", f"{mean:.5f} / {least:.5f}", ""),
    ]
    for name in FORMATS:
        loss = [second.losses[n] for n in (FLOAT, name)]
        mib = [second.sizes[n] / 2**20 for n in (FLOAT, name)]
        speed = [second.speed[n] for n in (FLOAT, name)]
        made += [
            (f"Llama in {name}, held-out loss", *_pair(loss, "{:.4f}"), _percent(loss)),
            ("  size, MiB", *_pair(mib, "{:.2f}"), f"{mib[1] / mib[0]:.2f}x"),
            ("  scoring, tokens/s", *_pair(speed, "{:.0f}"), str(second.speedup[name])),
        ]
    loss = [second.losses[n] for n in (ROUNDED, TRAINED)]
    made.append(("int4 rounded / trained, held-out loss", *_pair(loss, "{:.4f}"), _percent(loss)))
    return made


def note(found: QuantizedResult) -> str:
    """What the figures mean."""
    second = found.llama
    share = second.recovered
    recovered = "int4 lost nothing" if math.isnan(share) else f"that recovers {share:.0%} of it"
    return (
        "quantization: left float32, right quantized (the output layer and the embedding stay "
        f"float; the encoder skips padding); held-out text; {second.steps} steps more in float32 "
        f"give {second.losses[LONGER]:.4f}, {second.losses[ROUNDED]:.4f} once rounded to int4, and "
        f"with int4 in the loop {second.losses[TRAINED]:.4f}: {recovered}"
    )


def _pair(values: list[float], form: str) -> tuple[str, str]:
    return form.format(values[0]), form.format(values[1])


def _percent(values: list[float]) -> str:
    return f"{values[1] / values[0] - 1:+.2%}"


def main(arguments: list[str] | None = None) -> int:
    """Trains a Llama, measures both halves and prints the figures."""
    parser = argparse.ArgumentParser(description="float32 against quantized models")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the Llama")
    parser.add_argument("--more", type=int, default=60, help="steps that follow")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--count", type=int, default=256, help="sentences")
    args = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = Size()
    trainer = Trainer(size, device, swapped=True, verify=False)
    for _ in range(args.steps):
        trainer.step()
    found = compare(size, trainer.model, args.count, 32, args.more, args.seconds, device)
    for what, stock, ours, ratio in rows(found):
        print(f"{what:40} {stock:>10} {ours:>20} {ratio:>20}")
    print(note(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
