"""save_pretrained and from_pretrained of quantized models: what transformers has to be told.

Importing this module registers the method "fastllm" with transformers.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fastllm.quant.adopt import adopt
from fastllm.quant.formats import parse, with_scales
from fastllm.quant.linear import ACTIVATIONS, CODES, FOUND, QuantLinear, code_of, describe
from fastllm.quant.qtensor import quantize
from fastllm.quant.select import is_linear, oriented

METHOD = "fastllm"


@register_quantization_config(METHOD)
class PretrainedConfig(QuantizationConfigMixin):
    """`config.quantization_config` of a quantized model: its layers, path -> what it is made of."""

    def __init__(self, layers: dict[str, dict[str, Any]], **_: Any) -> None:
        self.quant_method: Any = METHOD
        self.layers = layers


def note(model: Any) -> None:
    """Writes down in the config of a PreTrainedModel which layers are quantized, if any is."""
    held = vars(model.config)
    if held.get("quantization_config") is not None:
        if not isinstance(held["quantization_config"], PretrainedConfig):
            return  # of another library, which goes first
        del held["quantization_config"]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    layers = {
        path: _spec(module, dtype)
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear)
    }
    if layers:
        model.config.quantization_config = PretrainedConfig(layers)


def _spec(layer: QuantLinear, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the shapes and dtypes of a layer's buffers follow from, as JSON."""
    form = layer.format
    spec: dict[str, Any] = {"format": str(form), "activations": ACTIVATIONS[layer.activations]}
    if form.scale_dtype != parse(str(form)).scale_dtype:
        spec["scales"] = _name(form.scale_dtype)
    if layer._like.dtype != dtype:
        spec["dtype"] = _name(layer._like.dtype)
    found = {n: list(b.shape) for n in FOUND if (b := layer._buffers[n]) is not None}
    if layer.threshold:
        spec["threshold"] = layer.threshold
    return spec | found


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


@register_quantizer(METHOD)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty QuantLinear where transformers loads codes; quantizes nothing itself."""

    quantization_config: Any
    requires_calibration = True  # `from_pretrained(quantization_config=...)` of a float model

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        gone = set()
        for path, spec in self.quantization_config.layers.items():
            here = _here(model, path)
            if here is None:  # a head that this class does not have
                continue
            if is_linear(layer := model.get_submodule(here)):
                _empty(layer, spec)
            elif not isinstance(layer, QuantLinear):
                raise ValueError(f"{here}: expected a linear layer, found {type(layer).__name__}")
            gone.add(f"{here}.weight")
        tied = model.all_tied_weights_keys
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if not {a, b} & gone}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for path, layer in model.named_modules():
            if isinstance(layer, QuantLinear) and not layer.format_code.is_meta:
                own = code_of(layer.format, layer.activations)
                if not torch.equal(own, layer.format_code.cpu()):
                    found = describe(layer.format_code)
                    raise ValueError(f"{path}: expected codes of {describe(own)}, found {found}")

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Codes and scales stay as they were saved, whatever dtype is asked for."""
        names = {key.rpartition(".")[2] for key in converter.target_patterns}
        if names <= {*CODES} - {"outlier_weight"}:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters, biases

    @property
    def is_compileable(self) -> bool:
        return True


def _here(model: Any, path: str) -> str | None:
    """The path in this model: AutoModel has no "model." in front of it that a causal LM has."""
    prefix = model.base_model_prefix + "."
    modules = dict(model.named_modules(remove_duplicate=False))
    return next((p for p in (path, path.removeprefix(prefix), prefix + path) if p in modules), None)


def _empty(layer: Any, spec: dict[str, Any]) -> None:
    """Makes a linear layer a QuantLinear in place, on the meta device, of what `spec` says."""
    held = layer._parameters
    dtype = getattr(torch, spec["dtype"]) if "dtype" in spec else held["weight"].dtype
    held["weight"] = nn.Parameter(held["weight"].to("meta", dtype), requires_grad=False)
    found = {n: torch.empty(spec[n], device="meta") for n in FOUND if n in spec}
    threshold = found.pop("outlier_threshold", None)  # `fill` would read its value
    adopt(layer, quantize(oriented(layer), spec["format"]), spec["activations"], **found)
    if threshold is not None:
        layer._buffers["outlier_threshold"] = threshold
        layer.threshold = spec["threshold"]
    if "scales" in spec:
        layer.format = with_scales(layer.format, getattr(torch, spec["scales"]))
