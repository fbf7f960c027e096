"""Training whose products are of int8, with weights and optimizer as they were.

Forward and the input's gradient are products of int8, the weight's gradient is one of 16 bits
(SwitchBack: Wortsman et al., "Stable and low-precision training for large-scale vision-language
models", 2023), or of int8 with the gradient rounded at random.

    handle = fastllm.quant.prepare_int8_training(model)      # then train as before
    handle.restore()
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import _C
from fastllm.core.instances import assign
from fastllm.ops import quant as ops
from fastllm.ops.quant.layout import INT8
from fastllm.ops.quant_linear import quant_linear
from fastllm.quant import select
from fastllm.quant.report import Report, Row, nbytes

GRADIENTS = ("16bit", "float", "int8")
"""What the product that makes a weight's gradient is of."""
_DOTS = _C.isa() in ("avx512_bf16", "amx")  # asked once: torch.compile cannot


class Int8TrainingLinear(nn.Linear):
    """torch.nn.Linear whose products are of int8 while its weight stays in float.

    The weight is rounded to int8 by rows at each call, input and output gradient by tokens;
    gradients pass the rounding straight through. The state_dict is the Linear's. Calls that int8
    would not speed up (see `worth`) are those of a Linear.
    """

    backend: str | None = None
    grad_weight: str  # one of GRADIENTS

    def forward(self, input: Tensor) -> Tensor:
        if not worth(input, self.weight):
            return F.linear(input, self.weight, self.bias)
        made: Any = _Product.apply(input, self.weight, self.bias, self.grad_weight, self.backend)
        return made

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8 products, grad_weight={self.grad_weight}"


class _Product(torch.autograd.Function):
    """input [*, K], weight [N, K], bias [N] -> [*, N]"""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, how: str, backend: str | None
    ) -> Tensor:
        codes, scales, _ = ops.quantize(weight, INT8, 0)
        ctx.save_for_backward(input, codes, scales)
        ctx.how, ctx.backend, ctx.dtypes = how, backend, (weight.dtype, bias is not None)
        return _multiply(input, codes, scales, bias, 0, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        input, codes, scales = ctx.saved_tensors
        dtype, biased = ctx.dtypes
        dx = dw = db = None
        dy, x = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        if ctx.needs_input_grad[0]:
            one = scales.new_ones(1)  # the scales are the gradient's, so that codes serve again
            weighted = dy * scales.to(dy.dtype).view(-1)
            dx = _multiply(weighted, codes.t().contiguous(), one, None, -1, ctx.backend)
            dx = dx.to(input.dtype).view(input.shape)
        if ctx.needs_input_grad[1]:
            dw = _grad_weight(dy, x, ctx.how, ctx.backend).to(dtype)
        if biased and ctx.needs_input_grad[2]:
            db = dy.sum(0, dtype=torch.float32).to(dtype)
        return dx, dw, db, None, None


def _multiply(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int, backend: str | None
) -> Tensor:
    return quant_linear(
        x, codes, scales, None, bias, code=INT8, group=group, activations="dynamic", backend=backend
    )


def _grad_weight(dy: Tensor, x: Tensor, how: str, backend: str | None) -> Tensor:
    """dy^T x [N, K] of dy [M, N] and x [M, K]."""
    if how == "int8":
        codes, scales = rounded_at_random(dy.t().contiguous())
        return _multiply(x.t().contiguous().to(dy.dtype), codes, scales, None, 0, backend).t()
    if how == "16bit" and dy.dtype == torch.float32 and fast_bfloat16(dy.device):
        return torch.mm(dy.t().bfloat16(), x.bfloat16())
    return torch.mm(dy.t(), x.to(dy.dtype))


def rounded_at_random(x: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes, float32 scales [rows, 1]) of x [rows, columns], right on average.

    A number between two codes becomes either, the nearer one more often (stochastic rounding).
    """
    x = x.float()
    top = x.abs().amax(1, keepdim=True)
    scales = top / 127
    units = x / torch.where(scales > 0, scales, 1.0)
    codes = (units + torch.rand_like(units)).floor().clamp(-127, 127)
    return codes.nan_to_num().to(torch.int8), scales


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 there."""
    return _DOTS if device.type == "cpu" else device.type == "cuda"


def worth(input: Tensor, weight: Tensor) -> bool:
    """Whether int8 is likely to be faster than the product in input's dtype.

    Measured on CPUs with AMX: float32 of 256 tokens and 512 features on, 1.1 to 2.4 times, unless
    both are as few as that; 16-bit products are faster than int8 with all that goes with it.
    GPUs are not measured: there, sizes from which others report a gain.
    """
    tokens, least = input.numel() // max(1, input.shape[-1]), min(weight.shape)
    if not input.is_cpu:
        return tokens >= 1024 and least >= 2048
    wide = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    large = tokens >= 256 and least >= 512 and tokens * weight.numel() >= 1 << 27
    return _DOTS and wide and large


class Int8Training:
    """What was prepared: `report`, and the way back. `str` is the report's table."""

    def __init__(self, report: Report, classes: dict[nn.Module, Any]) -> None:
        self.report = report
        self._classes = classes

    def restore(self) -> None:
        """The layers are what they were; their parameters are the very same ones all along."""
        for module, cls in self._classes.items():
            assign(module, cls)
            vars(module).pop("grad_weight", None)
        self._classes = {}

    def __str__(self) -> str:
        return str(self.report)


def prepare_int8_training(
    model: nn.Module, include: Any = None, exclude: Any = None, grad_weight: str = "16bit"
) -> Int8Training:
    """Makes the linear layers of `model` multiply int8 in training and inference, in place.

    include, exclude  as fastllm.quantize takes them
    grad_weight       "16bit": the gradients of weights come from products of 16-bit numbers (of
                      the model's own where the machine has none). "float": of the output
                      gradient's dtype. "int8": of int8, with the output gradient rounded at
                      random: on CPUs slower than the others

    Parameters stay the very same, so an optimizer made before goes on. Returns a handle:
    `restore()`, `report`. Raises ValueError naming the argument.
    """
    if grad_weight not in GRADIENTS:
        names = ", ".join(map(repr, GRADIENTS))
        raise ValueError(f"grad_weight: expected one of {names}, found {grad_weight!r}")
    known, found = select.candidates(model, include, exclude)
    head, rows, classes = include is not None, [], {}
    for module, path in found:
        row = Row(path, select.kind_of(module).__name__, before=nbytes(module))
        rows.append(row)
        why = select.why_not_own(module, known, head, Int8TrainingLinear, "already prepared")
        row.reason = why or ""
        if not row.reason:
            classes[module] = type(module)
            module.grad_weight = grad_weight  # type: ignore[assignment]
            assign(module, Int8TrainingLinear)
            row.new, row.after = "int8 products", row.before
    total = nbytes(model)
    return Int8Training(Report(rows, total, total, "int8 training"), classes)
