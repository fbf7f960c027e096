"""2:4 sparsity that pays: layers that store, read and train only the half that is not zero.

The pattern is that of Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021). Prune
first, then:

    fastllm.quant.prune(model, pattern=(2, 4)).finalize()
    fastllm.quant.to_sparse(model)             # or "int8", "int8_weight"; to_dense(model) undoes it
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.instances import assign
from fastllm.ops.quant import quantize
from fastllm.ops.quant.layout import INT8
from fastllm.ops.sparse_linear import expand, pack, pick, sparse_linear
from fastllm.quant import select
from fastllm.quant.calibrate import sqnr
from fastllm.quant.lazy import LazyWeight
from fastllm.quant.qtensor import check_finite
from fastllm.quant.report import Report, Row, nbytes

FORMATS = {"float": "float", "int8_weight": "float", "int8": "dynamic"}
"""What activations are in each."""
PARTS = ("values", "kept", "scales")


class SparseLinear(nn.Linear):
    """torch.nn.Linear that keeps two of every four weights along a row.

    input [*, in_features], output [*, out_features].

    Made by `from_dense` or `to_sparse`. In the state_dict: `values`, a parameter [out_features,
    2 ceil(in_features / 4)] (a buffer of int8 in the formats "int8" and "int8_weight"), `kept`
    (uint8 [out_features, ceil(in_features / 8)], which elements they are), `scales` (int8: one a
    row), `bias`. A state_dict with `weight` is packed as it is loaded, and refused where it is
    not 2:4. `weight` is what all this stands for: see LazyWeight.

    Float values are trained like any parameter, and what is zero stays zero.
    """

    backend: str | None = None
    format: str  # a key of FORMATS
    values: Tensor
    kept: Tensor
    scales: Tensor | None
    _base: Any  # the class that it had
    _like: Tensor  # nothing, in the dtype that `weight` has

    @classmethod
    def from_dense(cls, linear: nn.Linear, format: str = "float") -> "SparseLinear":
        """A sparse copy of a Linear whose weight is 2:4; the bias is the very same one."""
        made = nn.Linear(1, 1, device="meta")
        made.in_features, made.out_features = linear.in_features, linear.out_features
        made.register_parameter("bias", linear._parameters["bias"])
        made.train(linear.training)
        _adopt(made, linear.weight, format)
        return made  # type: ignore[return-value]

    def forward(self, input: Tensor) -> Tensor:
        return sparse_linear(
            input,
            self.values,
            self.kept,
            self.scales,
            self.bias,
            activations=FORMATS[self.format],
            backend=self.backend,
        )

    def dense(self) -> Tensor:
        """The whole weight [out_features, in_features], now."""
        made = expand(self.values.detach(), self.kept, self.in_features)
        return made if self.scales is None else (made * self.scales[:, None]).to(self._like.dtype)

    def set_weight(self, weight: Tensor) -> None:
        """Packs another 2:4 weight [out_features, in_features] into this layer, in place."""
        self._fits(weight)
        for name, new in _packed(weight.detach(), self.format, self._like.dtype).items():
            getattr(self, name).detach().copy_(new)

    def _fits(self, weight: Tensor) -> None:
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected:
            raise ValueError(f"weight: expected shape {expected}, found {list(weight.shape)}")

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight [out_features, in_features], zeros included."""
        return self.dense() if torch.compiler.is_compiling() else LazyWeight(self, self._like)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        """Moves everything; a cast leaves the scales of int8 values in float32."""
        scales = self.scales
        super()._apply(fn, recurse)
        if scales is not None and self.scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.kept.device)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        weight = state_dict.get(prefix + "weight")
        if weight is not None and prefix + "values" not in state_dict:
            state_dict = {k: v for k, v in state_dict.items() if k != prefix + "weight"}
            own = {n: getattr(self, n) for n in PARTS}
            state_dict |= {prefix + n: v for n, v in own.items() if v is not None}
            try:
                self._fits(weight)
                new = _packed(
                    weight if self.kept.is_meta else weight.to(self.kept.device),
                    self.format,
                    self._like.dtype,
                )
                state_dict |= {prefix + n: v for n, v in new.items()}
            except ValueError as error:
                error_msgs.append(prefix + str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if self._like.device != self.kept.device:  # a meta model that was assigned to
            self._like = torch.empty_like(self._like, device=self.kept.device)


def _packed(weight: Tensor, format: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a SparseLinear holds of a 2:4 weight."""
    if format == "float":
        values, kept = pack(weight.to(dtype))
        return {"values": values, "kept": kept}
    codes, scales, _ = quantize(weight, INT8, 0)
    check_finite(scales, weight)
    _, kept = pack(weight)  # not of the codes: small weights have the code 0
    return {"values": pick(codes, kept), "kept": kept, "scales": scales[:, 0].contiguous()}


def _adopt(module: Any, weight: Tensor, format: str) -> None:
    """Makes a Linear a SparseLinear in place: hooks, owners and paths stay."""
    made = _packed(weight.detach(), format, weight.dtype)
    values, wanted = made["values"], weight.requires_grad
    module._parameters.pop("weight")
    if format == "float":
        # where the weight was, so that parameters keep their order
        module._parameters = {"values": nn.Parameter(values, wanted), **module._parameters}
    else:
        module.register_buffer("values", values)
    module.register_buffer("kept", made["kept"])
    module.register_buffer("scales", made.get("scales"))
    module.register_buffer("_like", weight.detach().new_empty(0), persistent=False)
    module.format, module._base = format, type(module)
    assign(module, SparseLinear)


def to_sparse(
    model: nn.Module, format: str = "float", include: Any = None, exclude: Any = None
) -> Report:
    """Makes the linear layers of `model` whose weights are 2:4 SparseLinear, in place.

    format    "float": the weights as they are. "int8_weight": int8 with a scale a row. "int8": and
              activations quantized token by token
    include, exclude  as fastllm.quantize takes them

    Layers with more than two weights in any four neighbours are left alone, and the report says
    so: prune them with `pattern=(2, 4)` and `finalize()` that first. In "float", `values` is a new
    parameter: make the optimizer afterwards. `to_dense(model)` is the way back. Returns a Report;
    raises ValueError naming the argument.
    """
    if format not in FORMATS:
        names = ", ".join(map(repr, FORMATS))
        raise ValueError(f"format: expected one of {names}, found {format!r}")
    known, found = select.candidates(model, include, exclude)
    rows, before = [], nbytes(model)
    for module, path in found:
        row = Row(path, select.kind_of(module).__name__, before=nbytes(module))
        rows.append(row)
        head = include is not None
        row.reason = select.why_not_own(module, known, head, SparseLinear, "already sparse") or ""
        if row.reason:
            continue
        weight = module.weight
        try:
            _adopt(module, weight, format)
        except ValueError as error:
            row.reason = str(error).removeprefix("weight: ")
            continue
        row.new, row.after = f"2:4 {format}", nbytes(module)
        row.sqnr = sqnr(weight.detach(), module.dense())
    return Report(rows, before, nbytes(model), f"2:4 {format}")


@torch.no_grad()
def to_dense(model: nn.Module) -> nn.Module:
    """Every SparseLinear of `model` as the Linear that it was, with its weight of today, in place.

    Returns the model. In the int8 formats the weights are what the codes stand for.
    """
    for module in [m for m in model.modules() if isinstance(m, SparseLinear)]:
        values: Any = module.values
        weight = nn.Parameter(module.dense(), getattr(values, "requires_grad", False))
        for name in (*PARTS, "_like"):
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
        module._parameters.pop("values", None)
        module._parameters = {"weight": weight, **module._parameters}
        assign(module, module._base)
        del module._base, module.format
    return model
