"""Second half: a small Llama that trains on the same text, stock against swapped."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastllm.cli.demo.encoder import STOCK, SWAPPED
from fastllm.cli.demo.text import document
from fastllm.core.measure import Measurement, Ratio
from fastllm.swap.engine import swap_model as swap

WARM_UP = 3  # steps that are trained, but not timed


@dataclass(frozen=True)
class Size:
    """Of the model and its batches; a token is a byte."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_heads: int = 4
    intermediate: int = 704
    length: int = 256
    batch: int = 8

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch * self.length


QUICK = Size(hidden=128, layers=2, heads=4, key_heads=2, intermediate=352, length=128, batch=8)


@dataclass(frozen=True)
class LlamaResult:
    """Losses by step, tokens/s by timed step, ratios, what was swapped, the trained models."""

    size: Size
    parameters: int
    losses: dict[str, list[float]]
    rates: dict[str, list[float]]
    speed: dict[str, float]
    speedup: Ratio
    report: Any
    models: dict[str, Any]


class Trainer:
    """One model, its optimizer and its place in the text."""

    def __init__(self, size: Size, device: str, swapped: bool, verify: bool = True) -> None:
        self.size, self.device = size, device
        self.model = build(size, seed=0).to(device).train()
        self.report: Any = None
        if swapped:
            ids = batch_of(size, 0, device)[:2, :32]
            proof = {"input_ids": ids, "labels": ids} if verify else None
            self.report = swap(self.model, verify=proof).report()  # type: ignore[operator]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self) -> None:
        """One optimizer step on the next batch, timed."""
        ids = batch_of(self.size, len(self.losses), self.device)
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())  # on a GPU, this is what waits for the step
        self.seconds.append(time.perf_counter() - start)


def compare(
    size: Size | None = None,
    steps: int = 150,
    seconds: float = 50.0,
    device: str = "cpu",
    tick: Callable[[float], Any] | None = None,
) -> LlamaResult:
    """Trains both models on the same batches, step by step in turns, so that noise hits both.

    Ends after `steps` steps each, or after `seconds` once there are enough steps to time.
    """
    size = size or Size()
    trainers = {STOCK: Trainer(size, device, False), SWAPPED: Trainer(size, device, True)}
    begin = time.perf_counter()
    for number in range(steps):
        spent = (time.perf_counter() - begin) / seconds
        if tick:
            tick(min(max(spent, number / steps), 1.0))
        if spent >= 1 and number >= WARM_UP + 5:
            break
        order = list(trainers.values())
        for trainer in order if number % 2 else reversed(order):
            trainer.step()
    if tick:
        tick(1.0)
    samples = {name: t.seconds[WARM_UP:] or t.seconds for name, t in trainers.items()}
    found = Measurement(samples, sets=[0] * len(samples[STOCK]))
    return LlamaResult(
        size=size,
        parameters=sum(p.numel() for p in trainers[STOCK].model.parameters()),
        losses={name: t.losses for name, t in trainers.items()},
        rates={name: [size.tokens / s for s in times] for name, times in samples.items()},
        speed={name: size.tokens / found.seconds(name) for name in samples},
        speedup=found.speedup(SWAPPED, over=STOCK),
        report=trainers[SWAPPED].report,
        models={name: t.model for name, t in trainers.items()},
    )


def build(size: Size, seed: int) -> Any:
    """A Llama with random weights, always the same for a seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def batch_of(size: Size, step: int, device: str) -> Tensor:
    """Token ids [batch, length] of a step: random places in the text, the same for every model."""
    text = _bytes()[: -_held_out_bytes()]
    places = torch.randint(
        len(text) - size.length, (size.batch, 1), generator=torch.Generator().manual_seed(step)
    )
    return text[places + torch.arange(size.length)].to(device)


def held_out(size: Size, device: str) -> Tensor:
    """Token ids [64, length] of text that no batch is from, the same for every model."""
    text = _bytes()[-_held_out_bytes() :]
    places = torch.arange(64).unsqueeze(1) * ((len(text) - size.length) // 64)
    return text[places + torch.arange(size.length)].to(device)


def _held_out_bytes() -> int:
    """The last sixteenth."""
    return len(_bytes()) // 16


_TEXT: list[Tensor] = []


def _bytes() -> Tensor:
    if not _TEXT:
        _TEXT.append(torch.frombuffer(bytearray(document().encode()), dtype=torch.uint8).long())
    return _TEXT[0]
