"""The report's picture: what was fast, what stayed the same, what it took."""

import io
from collections.abc import Sequence
from typing import Any

from fastllm.cli.demo.encoder import STOCK, SWAPPED, EncoderResult
from fastllm.cli.demo.llama import LlamaResult
from fastllm.cli.demo.memory import Memory
from fastllm.core.measure import Ratio, quartiles

_COLOR = {STOCK: "#9aa3ad", SWAPPED: "#0b7a75"}
_INK, _FAINT = "#20262d", "#d9dee3"
_NAMES = (STOCK, SWAPPED)


def draw(
    encoder: EncoderResult, llama: LlamaResult, memory: dict[str, Memory], title: str
) -> bytes:
    """A PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": _FAINT,
        "legend.frameon": False,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.6), layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.15, h_pad=0.15)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        _speed_bars(axes[0][0], "Encoder: sentences/s", encoder.speed, encoder.speedup)
        _quotients(axes[0][1], encoder.batch_speedups)
        _cosines(axes[0][2], encoder.cosines)
        _losses(axes[1][0], llama.losses)
        _rates(axes[1][1], llama)
        _memory(axes[1][2], memory)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        pyplot.close(figure)
    return buffer.getvalue()


def _speed_bars(axis: Any, title: str, speed: dict[str, float], ratio: Ratio) -> None:
    axis.set_title(title)
    bars = axis.bar(
        _NAMES, [speed[n] for n in _NAMES], color=[_COLOR[n] for n in _NAMES], width=0.55
    )
    axis.bar_label(bars, fmt="%.0f", padding=3)
    axis.margins(y=0.16)
    axis.set_xlabel(f"swapped / stock: {ratio.value:.2f}x  ({ratio.low:.2f}-{ratio.high:.2f})")


def _quotients(axis: Any, quotients: Sequence[float]) -> None:
    """Each dot is one batch, encoded by both models one after the other."""
    axis.set_title("Encoder: speedup, batch by batch")
    low, middle, high = quartiles(quotients)
    axis.axhspan(low, high, color=_COLOR[SWAPPED], alpha=0.12, lw=0)
    axis.axhline(middle, color=_COLOR[SWAPPED], lw=1.5, label=f"median {middle:.2f}x")
    axis.axhline(1, color=_INK, lw=1, ls=":", label="equal")
    axis.plot(range(1, len(quotients) + 1), quotients, "o", ms=4, color=_COLOR[SWAPPED], alpha=0.6)
    axis.set_ylim(*_around(quotients))
    axis.set_xlabel("batch")
    axis.legend(loc="upper right", ncols=2)


def _cosines(axis: Any, cosines: Sequence[float]) -> None:
    """Distances from 1 are rounding: on a log scale, with zero at the floor."""
    axis.set_title("Encoder: same answers (1 - cosine)")
    floor = 1e-15
    distances = sorted(max(abs(1 - c), floor) for c in cosines)
    axis.set_yscale("log")
    axis.plot(range(1, len(distances) + 1), distances, color=_COLOR[SWAPPED], lw=2)
    axis.axhline(1e-3, color=_INK, lw=1, ls=":")
    axis.text(1, 1.3e-3, "a cosine of 0.999", fontsize=9)
    axis.set_ylim(floor / 2, 1e-2)
    axis.set_xlabel("sentence, by distance")


def _losses(axis: Any, losses: dict[str, list[float]]) -> None:
    axis.set_title("Llama: training loss")
    steps = range(1, len(losses[STOCK]) + 1)
    axis.plot(steps, losses[STOCK], color=_COLOR[STOCK], lw=4, label=STOCK)
    axis.plot(steps, losses[SWAPPED], color=_COLOR[SWAPPED], lw=1.5, label=SWAPPED)
    apart = max(abs(a - b) for a, b in zip(losses[STOCK], losses[SWAPPED], strict=True))
    axis.set_xlabel(f"step  (largest difference {apart:.1e})")
    axis.legend()


def _rates(axis: Any, llama: LlamaResult) -> None:
    axis.set_title("Llama: thousand tokens/s, step by step")
    for name in _NAMES:
        rates = [r / 1e3 for r in llama.rates[name]]
        steps = range(1, len(rates) + 1)
        axis.plot(steps, rates, "o", ms=3, color=_COLOR[name], alpha=0.6)
        middle = llama.speed[name] / 1e3
        axis.axhline(middle, color=_COLOR[name], lw=1.5, label=f"{name}, median {middle:.1f}")
    axis.set_ylim(0, 1.25 * max(max(r) for r in llama.rates.values()) / 1e3)
    x = llama.speedup
    axis.set_xlabel(f"timed step  (swapped / stock: {x.value:.2f}x, {x.low:.2f}-{x.high:.2f})")
    axis.legend(loc="upper right", ncols=2)


def _memory(axis: Any, memory: dict[str, Memory]) -> None:
    axis.set_title("Llama: peak memory of training, MiB")
    if not memory:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    before = [memory[n].before / 2**20 for n in _NAMES]
    added = [(memory[n].peak - memory[n].before) / 2**20 for n in _NAMES]
    colors = [_COLOR[n] for n in _NAMES]
    axis.bar(_NAMES, before, color=_FAINT, width=0.55, label="Python, torch, the model")
    bars = axis.bar(_NAMES, added, bottom=before, color=colors, width=0.55)
    axis.bar_label(bars, [f"{a:.0f}" for a in added], label_type="center", color="white")
    axis.bar_label(bars, [f"{a + b:.0f}" for a, b in zip(added, before, strict=True)], padding=3)
    axis.margins(y=0.3)
    axis.legend(loc="upper left")
    axis.set_xlabel("in color: what training adds")


def _around(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show the bulk and 1: a hiccup does not squeeze everything else flat."""
    low, _, high = quartiles(values)
    reach = max(3 * (high - low), 0.1)
    return min(low - reach, 0.9), max(high + reach, 1.1)
