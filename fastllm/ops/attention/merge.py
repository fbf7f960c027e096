"""merge_attention: attention over parts of the keys, put together."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.ops.attention.spec import require_tensors


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) over all keys, from attention over disjoint parts of them.

    For context parallelism and shared prefixes: out = sum(exp(lse_i - lse) out_i). Differentiable.

    outs  one [*, Dv] for each part, of one shape; lses one [*] each, natural logarithms

    A part that saw no key (lse -inf) counts nothing; a sink may be in one part only. Raises
    ValueError or TypeError for shapes that do not fit.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: expected as many as outs, at least one, found {len(lses)} for {len(outs)}"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        require_tensors(**{f"outs[{i}]": out, f"lses[{i}]": lse})
        if out.shape != outs[0].shape:
            raise ValueError(
                f"outs[{i}]: expected shape {list(outs[0].shape)}, found {list(out.shape)}"
            )
        if lse.shape != out.shape[:-1]:
            raise ValueError(
                f"lses[{i}]: expected shape {list(out.shape[:-1])}, found {list(lse.shape)}"
            )
    stacked = torch.stack(list(lses))
    blind = (stacked == -torch.inf).all(0)
    total = stacked.masked_fill(blind, 0.0).logsumexp(0)
    total = total.masked_fill(blind, 0.0)
    merged = sum(
        (lse - total).exp()[..., None] * out.to(lse.dtype)
        for out, lse in zip(outs, stacked, strict=True)
    )
    return merged.to(outs[0].dtype), total.masked_fill(blind, -torch.inf)
