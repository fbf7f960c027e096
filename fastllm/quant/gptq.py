"""GPTQ: the error of each column is made up for by the columns that are still to come.

Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers" (2022).
"""

import torch
from torch import Tensor

from fastllm.ops.quant import layout
from fastllm.quant.formats import Format
from fastllm.quant.grid import Zero, by_row, codes_of, scales_of, snap
from fastllm.quant.qtensor import QTensor

BLOCK = 128  # columns whose corrections reach the rest of the matrix at once
DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it


def gptq(weight: Tensor, format: Format, gram: Tensor, act_order: bool = False) -> QTensor:
    """weight [N, K] in `format`; gram [K, K] is X^T X of its inputs.

    act_order: columns whose inputs are largest come first, while the most others are left to make
    up for them. Groups stay where they are, so their scales are those of the weight as it came.
    """
    n, k = weight.shape
    order = torch.arange(k, device=weight.device)
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
        gram = gram[order][:, order]
    w, place = weight.float()[:, order], order.tolist()
    upper = inverse_factor(gram)
    group = format.group if format.group > 0 else k
    scales, zeros = scales_of(weight, format)
    own = layout.numbers(scales, torch.float32).clone()  # [N, groups], or [1] for the tensor
    shift = zeros.float().clone()
    raw = scales.clone()
    numbers = torch.empty_like(w)
    step = group * max(1, BLOCK // group) if format.group > 0 else BLOCK
    for begin in range(0, k, step):
        end = min(begin + step, k)
        block, errors = w[:, begin:end], torch.empty(n, end - begin, device=w.device)
        for i in range(begin, end):
            g = place[i] // group
            if format.group > 0 and i % group == 0 and not act_order:
                part = w[:, i : min(i + group, k)]
                s, z = scales_of(part.to(weight.dtype), by_row(format))
                raw[:, g : g + 1], own[:, g : g + 1] = s, layout.numbers(s, torch.float32)
                if zeros.numel():
                    shift[:, g : g + 1] = z.float()
            scale = own[:, g] if own.dim() == 2 else own
            unit = torch.where(scale == 0, 1.0, scale)
            zero: Zero = shift[:, g] if zeros.numel() else 8
            found = snap(w[:, i] / unit, format, zero)
            numbers[:, place[i]] = found
            error = (w[:, i] - found * scale) / upper[i, i]
            block[:, i - begin + 1 :] -= error.unsqueeze(1) * upper[i, i + 1 : end]
            errors[:, i - begin] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    kept = shift.to(zeros.dtype) if zeros.numel() else zeros
    each: Zero = 8
    if zeros.numel():
        each = layout.spread(shift, (n, k), format.group).expand(n, k)
    codes = codes_of(numbers, format, each)
    return QTensor(format, codes, raw, kept, (n, k), weight.dtype)


def inverse_factor(gram: Tensor, damp: float = DAMP) -> Tensor:
    """Upper triangular U with U^T U the inverse of the damped Hessian: [K, K] in float32.

    Inputs that are always zero get a curvature of their own. The damping grows until the
    factorization succeeds.
    """
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    for _ in range(8):
        diagonal += damp * mean
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float()
        damp *= 10
    raise ValueError("calibrate: the inputs of a layer have no usable covariance")
