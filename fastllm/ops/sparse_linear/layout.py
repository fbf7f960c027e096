"""Weights that keep two of every four neighbours along a row (2:4), and where these two belong.

values [N, 2 ceil(K / 4)]   the two of each four, in order
kept   [N, ceil(K / 8)]     uint8; bit j of byte i says that element 8 i + j is kept. Exactly two
                            bits of every four are set: what lies past K is kept with the value 0
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """[*, K] as a matrix, whatever is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def count(k: int) -> int:
    """Values of a row."""
    return 2 * -(-k // 4)


# which two of four elements the four bits name; the first ones where bits lack
_NAMED = [sorted(sorted(range(4), key=lambda j: not bits >> j & 1)[:2]) for bits in range(16)]


def _places(device: torch.device) -> Tensor:
    """[16, 2]. Made anew: one kept from call to call could be a transform's, and gone with it."""
    return torch.tensor(_NAMED, device=device)


def places(kept: Tensor, k: int) -> Tensor:
    """[N, 2 ceil(K / 4)] int64: the column of each value."""
    groups = count(k) // 2
    nibbles = torch.stack((kept & 15, kept >> 4), -1).flatten(-2)[:, :groups].long()
    first = 4 * torch.arange(groups, device=kept.device)
    return (_places(kept.device)[nibbles] + first[:, None]).flatten(-2)


def expand(values: Tensor, kept: Tensor, k: int) -> Tensor:
    """The whole weight [N, K]."""
    zeros = values.new_zeros(values.shape[0], 2 * count(k))
    return zeros.scatter(1, places(kept, k), values)[:, :k]


def pick(dense: Tensor, kept: Tensor) -> Tensor:
    """[N, 2 ceil(K / 4)]: what a whole matrix [N, K] has where elements are kept."""
    k = dense.shape[1]
    return F.pad(dense, (0, -k % 4)).gather(1, places(kept, k))


def grad_parameters(
    dy: Tensor,
    input: Tensor,
    kept: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_values, grad_bias) of dy [tokens, N], None where not needed; int8 values have none."""
    dv = pick(torch.mm(dy.t(), rows(input)), kept) if needs[1] and scales is None else None
    return dv, dy.sum(0) if needs[2] and bias is not None else None


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(values, kept) of a weight [N, K]; ValueError unless two of every four are zero."""
    if weight.dim() != 2:
        raise ValueError(f"weight: expected [N, K], found {list(weight.shape)}")
    n, k = weight.shape
    groups = F.pad(weight, (0, -k % 4)).unflatten(-1, (-1, 4)) if k else weight.new_empty(n, 0, 4)
    full = groups != 0
    if full.numel() and int(full.sum(-1).max()) > 2:
        many = int((full.sum(-1) > 2).sum())
        raise ValueError(
            f"weight: expected two zeros in every four neighbours along a row, found {many} fours "
            "with fewer: prune it with pattern=(2, 4) first"
        )
    weights = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    two = _places(weight.device)[(full * weights).sum(-1)]  # the first zeros fill up
    bits = F.pad((1 << two).sum(-1), (0, groups.shape[1] % 2))
    kept = (bits[:, ::2] | bits[:, 1::2] << 4).to(torch.uint8)
    return groups.gather(-1, two).flatten(-2), kept.contiguous()
