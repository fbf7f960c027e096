"""fastllm.quantize: the linear layers of a model become QuantLinear, in place and reversibly."""

import sys
from typing import Any

import torch
from torch import nn

from fastllm.core.run import Call, as_calls
from fastllm.quant import calibrate as data
from fastllm.quant import select
from fastllm.quant.adopt import Original, adopt
from fastllm.quant.config import Config, as_config
from fastllm.quant.formats import Format
from fastllm.quant.linear import CODES, FOUND, QuantLinear
from fastllm.quant.methods import encode
from fastllm.quant.progress import Progress
from fastllm.quant.report import Report, Row, nbytes
from fastllm.quant.select import oriented
from fastllm.quant.sparse import PARTS, SparseLinear

UNREACHED = "calibration never reached it: rounded to the nearest"


class Handle:
    """One quantization: `report()`, `restore()`; also a context manager.

    `modules` maps paths to the layers that it quantized. The originals live as long as the handle
    does, or until `free()`: drop it and the memory is given back.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: dict[str, nn.Module] = {}
        self._report = Report()
        self._originals: dict[nn.Module, Original] | None = {}

    def report(self) -> Report:
        """Sizes, the error of every layer, what was left alone and why. Printing it: a table."""
        return self._report

    def restore(self) -> None:
        """Gives every layer its float weight back, bit for bit. A second call does nothing.

        RuntimeError after `free()`. A bias that was trained meanwhile keeps its values.
        """
        if self._originals is None:
            raise RuntimeError("restore: the originals were freed")
        for module, original in self._originals.items():
            original.put_back(module)
        self._originals.clear()
        self.modules.clear()
        note(self.model)

    def free(self) -> None:
        """Drops the originals: from now on there is no way back."""
        self._originals = None

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.restore()

    def __str__(self) -> str:
        return str(self._report)

    def __repr__(self) -> str:
        return f"<fastllm.quantize of {type(self.model).__name__}: {self._report.summary}>"


def quantize(
    model: nn.Module,
    config: str | Format | Config = "int8",
    include: Any = None,
    exclude: Any = None,
    calibrate: Any = None,
    progress: bool = True,
    min_weights: int | None = None,
) -> Handle:
    """Quantizes the linear layers of `model` in place, also GPT-2's Conv1D.

    model      any torch.nn.Module
    config     "int8" (weights by rows, activations by tokens), "int8_weight", "int4", "nf4", "fp8",
               any other format (weights only), or a Config
    include    what may be quantized: globs on module paths ("model.layers.*"), classes, or a
               callable(path, module) -> bool, alone or in a list; a module stands for all in it
    exclude    what may not, in the same form
    calibrate  inputs of the model: a tensor, a tuple of arguments, a dict of keyword arguments, or
               a list or DataLoader of such. Methods learn from them, and the report's errors are
               those of the layers' outputs on them. Layers are quantized in order, and later ones
               are calibrated behind earlier ones where their statistics do not all fit into 1 GB
    progress   a bar on stderr where that is a terminal and it takes longer
    min_weights  layers with fewer weights are faster in float and stay there; 0 quantizes them,
               too. None: the Config's, which is 2^17 unless it says otherwise

    "int8" is the fastest for float32 models; formats of weights alone are made for bfloat16, and
    with float32 activations more than a few tokens run no faster than in floats.

    The output layer of a language model stays in float unless Config(head=True); a tied one is no
    longer tied then, and the embedding stays float. Other shared weights stay as they are. The
    report says so. Gradients flow to inputs and biases, not to codes: train adapters, or see
    fastllm.quant.prepare_qat.

    A transformers model can be saved with save_pretrained and loaded with from_pretrained, where
    fastllm is known to transformers: fastllm.quant.register_transformers.

    Returns a Handle: report(), restore(), free(). Quantizing again does nothing. If anything is
    raised on the way, the model is as it was. Raises TypeError or ValueError naming the argument,
    and ValueError for a weight with NaN or infinity.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    config = as_config(config, min_weights)
    calls = None if calibrate is None else as_calls(calibrate, "calibrate")
    if config.needs_data and calls is None:
        raise ValueError(f"calibrate: expected batches for {config}, found None")
    handle = Handle(model)
    before = nbytes(model)
    plan, rows = _plan(model, include, exclude, config)
    bar = Progress()
    tokens: dict[int, int] = {}
    try:
        for portion in _portions(plan, calls):
            tick = (lambda share: bar.step(share, "calibrating")) if progress else None
            stats = {} if calls is None else data.collect(model, portion, calls, tick)
            tokens |= {len(s.gram): s.tokens for s in stats.values()}
            for layer in portion:
                if progress:
                    bar.step(len(handle.modules) / len(plan), plan[layer].path)
                _one(handle, layer, plan[layer], config, stats.get(layer), calls)
    except BaseException:
        handle.restore()
        raise
    finally:
        bar.close()
    note(model)
    handle._report = Report(rows, before, nbytes(model), str(config))
    if calls is not None:
        handle._report.measured = "outputs"
        handle._report.notes += _too_few(tokens, config)
    small = sum(row.small for row in rows)
    if small:
        handle._report.notes.append(
            f"{small} layer{'' if small == 1 else 's'} with fewer than {config.smallest} weights "
            "stayed in float, where they are faster; min_weights=0 quantizes them"
        )
    return handle


def note(model: nn.Module) -> None:
    """Keeps the config of a transformers model true to its layers: save_pretrained writes it."""
    known = sys.modules.get("transformers.modeling_utils")
    if known is not None and isinstance(model, known.PreTrainedModel):
        from fastllm.quant import pretrained

        pretrained.note(model)


def _too_few(tokens: dict[int, int], config: Config) -> list[str]:
    """What to say of layers with more inputs than there were tokens: inputs -> tokens."""
    width = max(tokens, default=0)
    if config.method != "gptq" or tokens.get(width, 0) >= width:
        return []
    return [
        f"calibrate had {tokens[width]} tokens for layers of {width} inputs: 'gptq' fits what it "
        "was shown, so that other text may come out worse than rounded; give it some thousands"
    ]


def _plan(
    model: nn.Module, include: Any, exclude: Any, config: Config
) -> tuple[dict[nn.Module, Row], list[Row]]:
    """The layers to quantize, and a row for each that was looked at."""
    known, found = select.candidates(model, include, exclude)
    plan: dict[nn.Module, Row] = {}
    rows = []
    for module, path in found:
        row = Row(path, select.kind_of(module).__name__, before=nbytes(module))
        rows.append(row)
        row.reason = select.why_not(module, known, config.head) or ""
        if not row.reason:
            row.reason = select.too_small(module, config.smallest) or ""
            row.small = bool(row.reason)
        if not row.reason:
            row.note = select.untied(module, known)
            plan[module] = row
    return plan, rows


def _portions(plan: dict[nn.Module, Row], calls: list[Call] | None) -> Any:
    layers = list(plan)
    if calls is None:
        return [layers]
    return data.portions(layers, [oriented(layer).shape[1] for layer in layers])


@torch.no_grad()
def _one(
    handle: Handle,
    layer: Any,
    row: Row,
    config: Config,
    stats: data.Stats | None,
    calls: list[Call] | None,
) -> None:
    """Quantizes one layer and fills its row."""
    weight = oriented(layer).detach()
    if calls is not None and stats is None:
        row.note = "; ".join(filter(None, (row.note, UNREACHED)))
    try:
        made = encode(weight, config, stats)
    except ValueError as error:
        raise ValueError(f"{row.path}: {error}") from error
    scales = {name: getattr(made, name) for name in FOUND}
    original = adopt(layer, made.q, made.activations, **scales)
    assert handle._originals is not None
    handle._originals[layer] = original
    handle.modules[row.path] = layer
    row.new = str(config)
    row.after = nbytes(layer)
    row.sqnr = data.sqnr(weight, layer.dense(), None if stats is None else stats.gram)


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict of the float model that a quantized or sparse one stands for, with its keys.

    Loads into the model before it was quantized, with torch's load_state_dict or anybody's.
    """
    state = dict(model.state_dict())
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantLinear | SparseLinear):
            continue
        prefix = path + "." if path else ""
        for name in (*CODES, *PARTS):
            state.pop(prefix + name, None)
        weight, turned = module.dense(), isinstance(module, QuantLinear) and module.transposed
        state[prefix + "weight"] = weight.t().contiguous() if turned else weight
    return state
