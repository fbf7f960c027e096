"""Linear and Embedding: torch's modules with forward through fastllm.functional.

`backend` is a class attribute (None: the best one), as in the norms.
"""

import torch
from torch import Tensor
from torch.nn import functional as stock

from fastllm import functional as F
from fastllm.nn.worth import worth


class Linear(torch.nn.Linear):
    """torch.nn.Linear: input [*, in_features], output [*, out_features].

    With `accumulates` set to True (on an instance or a class), backward adds the gradients to
    `weight.main_grad` and `bias.main_grad`, float32 tensors that the caller made, wherever they
    exist, instead of making `weight.grad`: fastllm.functional.linear_main_grad.
    """

    backend: str | None = None
    accumulates = False

    def forward(self, input: Tensor) -> Tensor:
        if self.accumulates and (total := getattr(self.weight, "main_grad", None)) is not None:
            return F.linear_main_grad(
                input,
                self.weight,
                self.bias,
                main_grad=total,
                bias_main_grad=getattr(self.bias, "main_grad", None),
                backend=self.backend,
            )
        if self.backend is None and not worth(input, self.weight, self.bias):
            return stock.linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias, backend=self.backend)


class Embedding(torch.nn.Embedding):
    """torch.nn.Embedding: indices [*], output [*, embedding_dim]; deterministic backward.

    Reading rows is torch's, at the speed of memory; what is won is won in backward.
    """

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) or self.max_norm is not None or self.sparse:
            return super().forward(input)
        if self.backend is None and not (self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(input)
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            backend=self.backend,
        )
