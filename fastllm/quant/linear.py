"""QuantLinear: a linear layer whose weight is codes."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core import op
from fastllm.ops import quant as ops
from fastllm.ops.matmul.reference import activate
from fastllm.ops.quant.layout import KINDS, codes_dtype
from fastllm.ops.quant_linear import quant_linear
from fastllm.quant.formats import Format, parse, with_scales
from fastllm.quant.lazy import LazyWeight
from fastllm.quant.qtensor import QTensor, quantize, unnest
from fastllm.quant.select import oriented

ACTIVATIONS = ("float", "int8", "int8_static")  # by the number that the op takes
ROUNDED = ("int8", "int4")  # kinds of weights that meet rounded activations
CODES = (
    "codes", "scales", "zeros", "nested", "act_scale", "input_scale", "outliers", "outlier_weight",
    "outlier_threshold", "format_code",
)  # fmt: skip
FOUND = ("act_scale", "input_scale", "outliers", "outlier_weight", "outlier_threshold")  # optional
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class QuantLinear(nn.Linear):
    """torch.nn.Linear with a quantized weight: input [*, in_features], output [*, out_features].

    format       of the weight, a name or a Format
    activations  "float": they stay as they are; "int8": quantized token by token (int8, int4);
                 "int8_static": with the scale `act_scale`, found by calibration

    Of the last, a new layer has the scale 1 until one is loaded.

    Buffers, all in the state_dict: `codes`, `scales`, `zeros` (asymmetric formats), `nested`
    (double quantization), `act_scale`, `input_scale` [in_features] that the input is multiplied
    with first (SmoothQuant, AWQ), `outliers`, the numbers of inputs that stay in float (LLM.int8:
    Dettmers et al. 2022), with their `outlier_weight`, `outlier_threshold` [1] above which a value
    keeps its column in float for the call, and `format_code`. A dtype of `.to()`
    changes what `weight` and the bias are in, never the codes. A state_dict with `weight` is
    quantized as it is loaded; one of another format is refused. `weight` is what the codes stand
    for: see LazyWeight.

    The input and the bias have gradients, the codes none. Computes in the input's dtype.
    """

    backend: str | None = None
    _fastllm_fuses = True  # swap's blocks call `activated`
    format: Format
    activations: int  # a position in ACTIVATIONS
    transposed: bool  # it was a Conv1D
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    nested: Any
    act_scale: Tensor | None
    input_scale: Tensor | None
    outliers: Any
    outlier_weight: Any
    outlier_threshold: Tensor | None
    threshold: float  # the same as a number, 0 for none: reading a tensor breaks graphs
    format_code: Tensor
    _like: Tensor  # nothing, in the dtype that `weight` has

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str | Format = "int8",
        activations: str = "float",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", made.bias)
        q = quantize(made.weight.detach(), format)
        static = q.scales.new_ones(1) if activations == "int8_static" else None
        fill(self, q, activations, static, like=made.weight)

    @classmethod
    def from_float(
        cls, linear: nn.Module, format: str | Format = "int8", activations: str = "float"
    ) -> "QuantLinear":
        """A quantized copy of a Linear, or of GPT-2's Conv1D; the bias is the very same one."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.register_parameter("bias", linear._parameters["bias"])
        made.train(linear.training)
        weight = oriented(linear)
        made.out_features, made.in_features = weight.shape
        q = quantize(weight.detach(), parse(format))
        fill(made, q, activations, like=weight, transposed=not isinstance(linear, nn.Linear))
        return made

    @classmethod
    def from_qtensor(
        cls, q: QTensor, bias: Tensor | None = None, activations: str = "float"
    ) -> "QuantLinear":
        """A layer of codes that are there already, those of `read_gptq`, say; nothing is copied.

        q [out_features, in_features], bias [out_features] in q.dtype. Raises TypeError or
        ValueError naming the argument.
        """
        if not isinstance(q, QTensor):
            raise TypeError(f"q: expected a QTensor, found {type(q).__name__}")
        if len(q.shape) != 2:
            raise ValueError(f"q: expected a matrix, found {q}")
        if bias is not None and (tuple(bias.shape) != q.shape[:1] or bias.dtype != q.dtype):
            expected = f"[{q.shape[0]}] in {q.dtype}"
            raise ValueError(f"bias: expected {expected}, found {op.describe(bias)}")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        own = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        made.register_parameter("bias", own)
        made.out_features, made.in_features = q.shape
        fill(made, q, activations, like=torch.empty(0, dtype=q.dtype, device=q.device))
        return made

    def forward(self, input: Tensor) -> Tensor:
        return self.activated(input)

    def activated(self, input: Tensor, activation: str | None = None) -> Tensor:
        """activation(forward(input)) in one pass: None, or what functional.linear takes."""
        held: Any = self._buffers  # attributes of modules are slow, and a token passes many layers
        scale, outliers = held["input_scale"], held["outliers"]
        made = quant_linear(
            input if scale is None else input * scale.to(input.dtype),
            held["codes"],
            self.float_scales() if self.format.double else held["scales"],
            held["zeros"],
            self._parameters["bias"],
            code=self.format.code,
            group=self.format.group,
            activations=self.activations,
            act_scale=held["act_scale"],
            activation=activation if outliers is None else None,
            outlier_threshold=self.threshold,
            backend=self.backend,
        )
        if outliers is None:
            return made
        kept = self.outlier_weight.to(input.dtype)
        made = made + nn.functional.linear(input[..., outliers], kept).to(made.dtype)
        return activate(made, activation)

    def float_scales(self) -> Tensor:
        """The scales as the ops take them."""
        return unnest(self.scales, self.nested) if self.format.double else self.scales

    def qtensor(self) -> QTensor:
        """The codes and scales, as fastllm.quant holds them; without `input_scale`."""
        none = self.scales.new_empty(0)
        zeros = none if self.zeros is None else self.zeros
        nested = none if self.nested is None else self.nested
        shape = (self.out_features, self.in_features)
        dtype = self._like.dtype
        return QTensor(self.format, self.codes, self.scales, zeros, shape, dtype, nested)

    def dense(self) -> Tensor:
        """What the codes stand for, dequantized now: [out_features, in_features]."""
        form, like = self.format, self._like
        zeros = self.codes.new_empty(0, dtype=like.dtype) if self.zeros is None else self.zeros
        k = self.in_features
        made = ops.dequantize(
            self.codes, self.float_scales(), zeros, form.code, form.group, k, like.dtype
        )
        scale = self._buffers["input_scale"]
        made = made if scale is None else made * scale.to(made.dtype)
        if self.outliers is None:
            return made
        return made.index_copy(1, self.outliers, self.outlier_weight.to(made.dtype))

    def set_weight(self, weight: Tensor) -> None:
        """Quantizes another weight [out_features, in_features] into these codes, in place."""
        expected = (self.out_features, self.in_features)
        if tuple(weight.shape) != expected:
            raise ValueError(f"weight: expected shape {list(expected)}, found {list(weight.shape)}")
        q = self._quantized(weight)
        self._scales_in(q.scales.dtype)
        for name in ("codes", "scales", "zeros", "nested"):
            if self._buffers[name] is not None:
                getattr(self, name).copy_(getattr(q, name))
        if self.outliers is not None:
            self.outlier_weight.copy_(weight.detach()[:, self.outliers])

    def _quantized(self, weight: Tensor) -> QTensor:
        scale = self._buffers["input_scale"]
        weight = weight.detach()
        if scale is not None:  # 0 for outliers, whose columns are kept apart
            weight = torch.where(scale == 0, 0.0, weight / torch.where(scale == 0, 1.0, scale))
        return quantize(weight.to(self._like.dtype), replace(self.format, scale_dtype=None))

    def _scales_in(self, dtype: torch.dtype) -> None:
        """Makes room for scales and zero points that the dtype of its own cannot hold."""
        if (
            dtype not in FLOATS
            or torch.promote_types(self.scales.dtype, dtype) == self.scales.dtype
        ):
            return
        self.format = with_scales(self.format, dtype)
        for name in ("scales", "zeros"):
            if (held := self._buffers[name]) is not None:
                self._buffers[name] = torch.empty_like(held, dtype=dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [out_features, in_features] that the codes stand for."""
        return self.dense() if torch.compiler.is_compiling() else LazyWeight(self, self._like)

    def reset_parameters(self) -> None:
        """A new random weight and bias, as torch.nn.Linear's."""
        fresh = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        self.set_weight(fresh.weight.to(self._like))
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(fresh.bias)

    def extra_repr(self) -> str:
        above = f", outlier_threshold={self.threshold:g}" if self.threshold else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, "
            f"activations={ACTIVATIONS[self.activations]}{above}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Plain pickle cannot read float8 tensors back: they travel as bytes."""
        state = dict(vars(self))
        codes = self._buffers["codes"]
        if codes is not None and codes.dtype.itemsize == 1:
            state["_buffers"] = {**self._buffers, "codes": codes.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        codes, wanted = self._buffers["codes"], codes_dtype(self.format.code)
        if codes is not None and codes.dtype != wanted:
            self._buffers["codes"] = codes.view(wanted)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        """Moves everything, and casts only the bias and what `weight` is dequantized to."""
        kept: dict[str, Any] = {n: b for n in CODES if (b := self._buffers.get(n)) is not None}
        kept.pop("outlier_weight", None)  # an ordinary weight
        for name, buffer in kept.items():  # a cast leaves integers alone
            self._buffers[name] = buffer.view(_WHOLE[buffer.element_size()])
        try:
            super()._apply(fn, recurse)
        finally:
            for name, buffer in kept.items():
                moved: Any = self._buffers[name]
                same = moved.dtype == _WHOLE[buffer.element_size()]
                self._buffers[name] = moved.view(buffer.dtype) if same else buffer.to(moved.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        weight, code = state_dict.get(prefix + "weight"), state_dict.get(prefix + "format_code")
        if weight is not None and prefix + "codes" not in state_dict:
            state_dict = self._from_float(state_dict, prefix, weight, error_msgs)
        elif code is not None and not code.is_meta:
            own = code_of(self.format, self.activations)  # the buffer may be meta, or still empty
            if not torch.equal(code[:4].cpu(), own[:4]):
                error_msgs.append(
                    f"{prefix}codes: expected {describe(own)}, found {describe(code)}"
                )
                return
            self.activations = int(code[4])
            for found in FOUND:
                value, mine = state_dict.get(prefix + found), self._buffers[found]
                if value is None or mine is None or mine.shape != value.shape:
                    self._buffers[found] = None if value is None else self._here(value, copy=True)
            self.threshold = number(state_dict.get(prefix + "outlier_threshold"))
            if (scales := state_dict.get(prefix + "scales")) is not None:
                self._scales_in(scales.dtype)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._like.device != self.codes.device:  # a meta model that was assigned to
            self._like = torch.empty_like(self._like, device=self.codes.device)

    def _here(self, tensor: Tensor, copy: bool = False) -> Tensor:
        """On the device of the codes, unless those are still to come."""
        return tensor if self.codes.is_meta else tensor.to(self.codes.device, copy=copy)

    def _from_float(self, state: Any, prefix: str, weight: Tensor, errors: list[str]) -> Any:
        """The entries of a float layer as this one's; its own codes where they do not fit."""
        own = {prefix + n: b for n in CODES if (b := self._buffers.get(n)) is not None}
        own[prefix + "format_code"] = code_of(self.format, self.activations)
        rest = {k: v for k, v in state.items() if k.startswith(prefix) and k != prefix + "weight"}
        weight = weight.t() if self.transposed else weight
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected:
            errors.append(f"{prefix}weight: expected shape {expected}, found {list(weight.shape)}")
            return own | rest
        try:
            q = self._quantized(self._here(weight))
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}weight: {error}")
            return own | rest
        self._scales_in(q.scales.dtype)
        new = {prefix + n: getattr(q, n) for n in ("codes", "scales", "zeros", "nested")}
        if self.outliers is not None:
            new[prefix + "outlier_weight"] = weight[:, self.outliers.to(weight.device)]
        return own | {k: v for k, v in new.items() if k in own} | rest


def number(threshold: Tensor | None) -> float:
    """An outlier_threshold as the op takes it."""
    return 0.0 if threshold is None else float(threshold)


def code_of(format: Format, activations: int) -> Tensor:
    """What a state_dict says its codes are: loading them as another format would be silent."""
    return torch.tensor(
        [format.code, format.group, format.symmetric, format.double, activations],
        dtype=torch.int32,
    )


def describe(code: Tensor) -> str:
    """A format_code in words."""
    kind, group, symmetric, double, activations = code.tolist()
    known = 0 <= kind < len(KINDS) and 0 <= activations < len(ACTIVATIONS)
    if not known:
        return f"format_code {code.tolist()}"
    form = Format(KINDS[kind], group, bool(symmetric), double=bool(double))
    return f"{form} with {ACTIVATIONS[activations]} activations"


def fill(
    module: Any,
    q: QTensor,
    activations: str = "float",
    act_scale: Tensor | None = None,
    input_scale: Tensor | None = None,
    outliers: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    outlier_threshold: Tensor | None = None,
    *,
    like: Tensor,
    transposed: bool = False,
) -> None:
    """Gives a module without weight the buffers and attributes of a QuantLinear."""
    if activations not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activations: expected one of {names}, found {activations!r}")
    if activations != "float" and q.format.kind not in ROUNDED:
        raise ValueError(f"activations: expected 'float' for {q.format}, found {activations!r}")
    if (activations == "int8_static") != (act_scale is not None):
        raise ValueError("act_scale: expected one with activations 'int8_static', and only there")
    module.format, module.transposed = q.format, transposed
    module.activations = ACTIVATIONS.index(activations)
    module.register_buffer("codes", q.codes)
    module.register_buffer("scales", q.scales)
    module.register_buffer("zeros", q.zeros if q.zeros.numel() else None)
    module.register_buffer("nested", q.nested if q.format.double else None)
    module.register_buffer("act_scale", act_scale)
    module.register_buffer("input_scale", input_scale)
    module.register_buffer("outliers", outliers)
    module.register_buffer("outlier_weight", outlier_weight)
    module.register_buffer("outlier_threshold", outlier_threshold)
    module.threshold = number(outlier_threshold)
    module.register_buffer("format_code", code_of(q.format, module.activations).to(q.device))
    module.register_buffer("_like", like.detach().new_empty(0), persistent=False)
