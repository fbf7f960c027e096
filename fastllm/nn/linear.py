"""Linear: torch's module with forward through fastllm.functional.

`backend` is a class attribute (None: the best one), as in the norms.
"""

import torch
from torch import Tensor
from torch.nn import functional as stock

from fastllm import functional as F
from fastllm.nn.worth import worth


class Linear(torch.nn.Linear):
    """torch.nn.Linear: input [*, in_features], output [*, out_features]."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.backend is None and not worth(input, self.weight, self.bias):
            return stock.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias, backend=self.backend)
