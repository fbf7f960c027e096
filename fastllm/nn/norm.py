"""LayerNorm, RMSNorm, GroupNorm: torch's modules with forward through fastllm.functional.

`backend` is a class attribute (None: the best one): nothing is added to an instance, so that
state_dict, repr and pickles are those of torch's class. `add(a, b)` is the residual form.
"""

import torch
from torch import Tensor

from fastllm import functional as F


def _plain(input: Tensor) -> bool:
    """False for what only torch's own norms take: nested tensors and the proxies of torch.fx."""
    return isinstance(input, Tensor) and not input.is_nested


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm (Ba et al. 2016); input [*, *normalized_shape], output alike."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not _plain(input):
            return super().forward(input)
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, backend=self.backend
        )

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(forward(input + residual), input + residual) in one pass; both of one shape."""
        return F.add_layer_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            backend=self.backend,
        )


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm (Zhang & Sennrich 2019); input [*, *normalized_shape], output alike."""

    backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not _plain(x):
            return super().forward(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, backend=self.backend)

    def add(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(forward(input + residual), input + residual) in one pass; both of one shape."""
        return F.add_rms_norm(
            input, residual, self.normalized_shape, self.weight, self.eps, backend=self.backend
        )


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm (Wu & He 2018); input [N, C, *], output alike."""

    backend: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not _plain(input):
            return super().forward(input)
        return F.group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, backend=self.backend
        )
