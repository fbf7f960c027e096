"""SparseGPT: what is set to zero is made up for by the weights to the right of it.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
(2023).
"""

import torch
from torch import Tensor

from fastllm.quant.gptq import BLOCK, inverse_factor


def sparsegpt(
    weight: Tensor, gram: Tensor, amount: float, pattern: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """(new weight [N, K] in float32, mask [N, K], False where it is zero)."""
    w = weight.float().clone()
    n, k = w.shape
    upper = inverse_factor(gram)
    mask = torch.ones_like(w, dtype=torch.bool)
    step = BLOCK if pattern is None else pattern[1] * max(1, BLOCK // pattern[1])
    for begin in range(0, k, step):
        end = min(begin + step, k)
        errors = torch.zeros(n, end - begin, device=w.device)
        diagonal = upper.diagonal()[begin:end]
        if pattern is None:
            score = (w[:, begin:end] / diagonal).square()
            count = round(amount * score.numel())
            lowest = score.flatten().topk(count, largest=False).indices
            chosen = torch.ones(score.numel(), dtype=torch.bool, device=w.device)
            mask[:, begin:end] = chosen.index_fill_(0, lowest, False).view(score.shape)
        for i in range(begin, end):
            if pattern is not None and i % pattern[1] == 0:
                stop = i + pattern[1]
                score = (w[:, i:stop] / upper.diagonal()[i:stop]).square()
                lowest = score.topk(pattern[0], dim=1, largest=False).indices
                mask[:, i:stop] = torch.ones_like(score, dtype=torch.bool).scatter_(
                    1, lowest, False
                )
            error = torch.where(mask[:, i], 0.0, w[:, i]) / upper[i, i]
            w[:, i:end] -= error.unsqueeze(1) * upper[i, i:end]
            errors[:, i - begin] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    return torch.where(mask, w, 0.0), mask
