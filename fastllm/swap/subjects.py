"""A whole encoder on a batch half of which is padding, for the bench."""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from fastllm.core.measure import Factory
from fastllm.core.subject import Scenario, Subject, Trial, register
from fastllm.swap.engine import swap_model

BATCH, LENGTH = 32, 128
WIDTH, LAYERS, HEADS, INNER = 384, 6, 12, 1536  # MiniLM's


def _encoder(dtype: torch.dtype, device: str) -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=8192, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=INNER,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config, add_pooling_layer=False).eval().to(device, dtype)


def _inputs(batch: int, device: str) -> dict[str, Any]:
    """Sentences of 1 to LENGTH tokens, half of LENGTH on average."""
    lengths = torch.linspace(1, LENGTH - 1, batch).long()
    seen = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(3, 8192, (batch, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "attention_mask": seen.to(device)}


def _candidate(model: nn.Module, inputs: dict[str, Any]) -> Factory:
    def call(i: int) -> Any:
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    return lambda: call


def _pair(dtype: torch.dtype, device: str) -> tuple[nn.Module, nn.Module]:
    stock = _encoder(dtype, device)
    ours = copy.deepcopy(stock)
    swap_model(ours, unpad=True)
    return stock, ours


def _trial(dtype: torch.dtype, device: str, direction: str) -> Trial:
    stock, ours = _pair(dtype, device)
    inputs = _inputs(BATCH, device)
    tokens = int(inputs["attention_mask"].sum())
    weights = LAYERS * WIDTH * (4 * WIDTH + 2 * INNER)
    return Trial(
        ours=_candidate(ours, inputs),
        stock={"eager": _candidate(stock, inputs)},
        nbytes=weights * dtype.itemsize,
        flops=2 * weights * tokens,
    )


def _wrong(dtype: torch.dtype, device: str) -> str | None:
    """Real tokens may be twice as far from float64 as stock's."""
    stock, ours = _pair(dtype, device)
    inputs = _inputs(4, device)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        exact = copy.deepcopy(stock).double()(**inputs).last_hidden_state[real]
        far = [
            float((m(**inputs).last_hidden_state[real] - exact).abs().max()) for m in (ours, stock)
        ]
    if far[0] <= 2 * far[1]:
        return None
    return f"encoder: {far[0]:.2g} from float64, stock {far[1]:.2g}"


register(
    Subject(
        "encoder_half_padded",
        "model",
        [
            Scenario(
                f"{BATCH}x{LENGTH}x{WIDTH}x{LAYERS}-{name}",
                dtype,
                LAYERS * WIDTH * INNER * BATCH * LENGTH // 10,
                partial(_trial, dtype),
                partial(_wrong, dtype),
            )
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        ],
        ("forward",),
    )
)
