"""Linear: torch's module with forward through fastllm.functional.

`backend` is a class attribute (None: the best one), as in the norms.
"""

import torch
from torch import Tensor
from torch.nn import functional as stock

from fastllm import functional as F

# below this many multiplications per call, the way to a kernel costs more than it can win back
SMALL = 1 << 20


class Linear(torch.nn.Linear):
    """torch.nn.Linear: input [*, in_features], output [*, out_features]."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.backend is None and not worth(input, self.out_features):
            return stock.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias, backend=self.backend)


def worth(input: Tensor, width: int) -> bool:
    """False for small products with `width` columns, and for what only torch takes: nested tensors
    and the proxies of torch.fx."""
    if torch.compiler.is_compiling():
        return True
    if not isinstance(input, Tensor) or input.is_nested:
        return False
    return input.numel() * width >= SMALL
