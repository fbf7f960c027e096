"""Training with quantization in the loop: prepare_qat before, convert_qat after.

Forward runs the very ops that the converted layer runs, on codes made from the weight of this
step, so that what was trained is what is served, bit for bit. Gradients pass the rounding straight
through (Bengio, Léonard, Courville 2013); learnable ranges are those of LSQ (Esser et al. 2019).
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastllm.core.instances import assign
from fastllm.core.select import paths_of
from fastllm.ops import quant as ops
from fastllm.ops.quant import layout
from fastllm.ops.quant_linear import quant_linear
from fastllm.quant import select
from fastllm.quant.adopt import adopt
from fastllm.quant.calibrate import sqnr
from fastllm.quant.config import Config, as_config
from fastllm.quant.formats import Format
from fastllm.quant.grid import scales_of
from fastllm.quant.linear import ACTIVATIONS
from fastllm.quant.models import note
from fastllm.quant.qtensor import QTensor, check_finite, nest, unnest
from fastllm.quant.report import Report, Row, nbytes


class QATLinear(nn.Linear):
    """torch.nn.Linear that computes as if it were quantized, with a float weight that is trained.

    The state_dict is the Linear's, and `ranges` (the scales) where they are learned.
    """

    backend: str | None = None
    format: Format
    activations: int
    ranges: nn.Parameter | None

    def forward(self, input: Tensor) -> Tensor:
        form = self.format
        result: Any = _Quantized.apply(
            input, self.weight, self.bias, self.ranges, form, self.activations, self.backend
        )
        return result

    def qtensor(self) -> QTensor:
        """The codes of the weight as it is now."""
        weight = self.weight.detach()
        codes, scales, zeros, nested = _codes(weight, self.ranges, self.format)
        check_finite(scales, weight)
        shape = tuple(weight.shape)
        return QTensor(self.format, codes, scales, zeros, shape, weight.dtype, nested)

    def extra_repr(self) -> str:
        learned = ", learned ranges" if self.ranges is not None else ""
        activations = ACTIVATIONS[self.activations]
        return f"{super().extra_repr()}, format={self.format}, activations={activations}{learned}"


class _Quantized(torch.autograd.Function):
    """input [*, K], weight [N, K] -> [*, N], with straight-through gradients."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, ranges: Tensor | None,
        form: Format, activations: int, backend: str | None,
    ) -> Tensor:  # fmt: skip
        codes, scales, zeros, nested = _codes(weight, ranges, form)
        ctx.form, ctx.dtype = form, weight.dtype
        ctx.learned, ctx.biased = ranges is not None, bias is not None
        kept = (weight, ranges) if ranges is not None else ()
        ctx.save_for_backward(input, codes, scales, zeros, nested, *kept)
        return quant_linear(
            input,
            codes,
            unnest(scales, nested) if form.double else scales,
            zeros if zeros.numel() else None,
            bias,
            code=form.code,
            group=form.group,
            activations=activations,
            backend=backend,
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        input, codes, scales, zeros, nested, *kept = ctx.saved_tensors
        form, width = ctx.form, input.shape[-1]
        want_input, want_weight, want_bias = ctx.needs_input_grad[:3]
        dx = dw = db = dr = None
        flat = grad.reshape(-1, grad.shape[-1])
        if want_input:
            numbers = unnest(scales, nested) if form.double else scales
            dense = ops.dequantize(codes, numbers, zeros, form.code, form.group, width, grad.dtype)
            dx = (grad @ dense).to(input.dtype)
        if want_bias and ctx.biased:
            db = flat.sum(0).to(ctx.dtype)
        if want_weight or ctx.learned:
            dw = (flat.t() @ input.reshape(-1, width).to(grad.dtype)).to(ctx.dtype)
        if dw is not None and ctx.learned:
            dw, dr = _range_gradients(dw, kept[0], kept[1], form)
        return dx, dw, db, dr, None, None, None


def _codes(
    weight: Tensor, ranges: Tensor | None, form: Format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, scales, zeros, nested: what the op takes, and what a QuantLinear holds."""
    if ranges is None:
        codes, scales, zeros = ops.quantize(weight, form.code, form.group, form.symmetric)
        if form.double:
            return codes, *_nested(scales, zeros)
        return codes, scales, zeros, scales.new_empty(0)
    codes, scales = ops.encode(weight, ranges, form.code, form.group)
    none = scales.new_empty(0)
    return codes, scales, none, none


def _nested(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested = nest(scales)
    return codes, zeros, nested


def _stored(ranges: Tensor, form: Format) -> Tensor:
    """Learned scales as a QuantLinear stores them."""
    return ranges.detach().to(layout.scales_dtype(form.code))


def _range_gradients(
    dw: Tensor, weight: Tensor, ranges: Tensor, form: Format
) -> tuple[Tensor, Tensor]:
    """LSQ: the weight's gradient stops outside of the range; the scale's is what rounding did."""
    dw, total = ops.range_gradients(
        dw, weight, _stored(ranges, form).float(), form.code, form.group
    )
    share = (total.numel() / dw.numel() / max(layout.limits(form.code)[1], 1.0)) ** 0.5
    return dw, total.to(ranges.dtype) * share


def prepare_qat(
    model: nn.Module,
    config: str | Format | Config = "int4",
    include: Any = None,
    exclude: Any = None,
    learn_ranges: bool = False,
    min_weights: int | None = None,
) -> Report:
    """Makes the linear layers of `model` train as they will be served, in place.

    config, include, exclude, min_weights: as fastllm.quantize takes them, and the same layers are
    left in float; methods that learn from data have no place here. learn_ranges: the scales of
    symmetric formats become parameters, too: make the optimizer afterwards, and give them a small
    learning rate. Parameters stay the very same.

    Then train, and call `convert_qat(model)`. Returns the report of what was prepared and what
    was left, and why. Raises TypeError or ValueError naming the argument.
    """
    config = as_config(config, min_weights)
    form = config.format
    if config.needs_data or config.method != "round":
        raise ValueError(f"config: expected one that needs no data, found {config}")
    if config.outlier_threshold is not None:
        raise ValueError(f"config: expected one without outlier_threshold, found {config}")
    if learn_ranges and (not form.symmetric or form.double or form.group < -1 or form.bits > 8):
        raise ValueError(f"learn_ranges: expected a symmetric format by groups, found {form}")
    if learn_ranges and form.kind == "mxfp8":
        raise ValueError("learn_ranges: mxfp8's scales are powers of two")
    known, found = select.candidates(model, include, exclude)
    rows = []
    for module, path in found:
        row = Row(path, select.kind_of(module).__name__, before=nbytes(module))
        rows.append(row)
        why = select.why_not_own(module, known, config.head, QATLinear, "already prepared")
        row.reason = why or select.too_small(module, config.smallest) or ""
        if not row.reason:
            _prepare(module, config, learn_ranges)
            row.new, row.after = f"trained as {config}", nbytes(module)
    return Report(rows, nbytes(model), nbytes(model), f"{config}, prepared")


def _prepare(module: Any, config: Config, learn_ranges: bool) -> None:
    form = config.format
    ranges = None
    if learn_ranges:
        ranges = nn.Parameter(scales_of(module.weight.detach(), form)[0].float())
    module.register_parameter("ranges", ranges)
    module.format, module.activations = form, ACTIVATIONS.index(config.activations)
    assign(module, QATLinear)


@torch.no_grad()
def convert_qat(model: nn.Module) -> Report:
    """Prepared layers become QuantLinear, in place; what they compute stays the same, bit for bit.

    Returns a report. Raises ValueError where nothing is prepared, or a weight holds NaN or
    infinity.
    """
    found = paths_of(model).items()
    prepared = [(names[0], m) for m, names in found if isinstance(m, QATLinear)]
    before, rows = nbytes(model), []
    if not prepared:
        raise ValueError("model: expected layers that prepare_qat prepared, found none")
    made = [module.qtensor() for _, module in prepared]
    for (path, module), q in zip(prepared, made, strict=True):
        row = Row(path, "QATLinear", str(module.format), before=nbytes(module))
        weight, activations = module.weight.detach(), ACTIVATIONS[module.activations]
        row.sqnr = sqnr(weight, q.dequantize())
        del module._parameters["ranges"]
        adopt(module, q, activations)
        row.after = nbytes(module)
        rows.append(row)
    note(model)
    return Report(rows, before, nbytes(model), "converted")
