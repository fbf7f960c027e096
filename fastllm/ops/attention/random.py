"""Which probabilities dropout keeps: a hash of seed, batch, head, query and key, on any device.

A kernel may visit the pairs in any order, and backward makes the mask again instead of reading it.
In 32-bit unsigned arithmetic, with `mix` the finalizer lowbias32 (Wellons 2018):

    a = mix(low(seed) + G * (batch * H + head))      c = mix(high(seed) ^ a)
    row_a = mix(a + G * query)                       row_b = mix(c ^ row_a)
    x = row_a + G * key
    x = (x ^ x >> 16) * M1
    x = x ^ row_b
    x = (x ^ x >> 15) * M2
    x = x ^ x >> 16

A probability is kept iff x >= threshold(p), and then divided by 1 - p.
"""

import torch
from torch import Tensor

G, M1, M2 = 0x9E3779B9, 0x7FEB352D, 0x846CA68B
_WORD = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """What a hash has to reach: p of 2^32, at most 2^32 - 1."""
    return min(int(dropout_p * 2**32), _WORD)


def factor(dropout_p: float) -> float:
    """What kept probabilities are multiplied by; 0 where nothing is kept."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def mix(x: Tensor) -> Tensor:
    """lowbias32 of 32-bit words held in int64."""
    x = ((x ^ (x >> 16)) * M1) & _WORD
    x = ((x ^ (x >> 15)) * M2) & _WORD
    return x ^ (x >> 16)


def keep(seed: Tensor, heads: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """bool [*heads, rows, columns]; `heads` int64 has batch * H + head."""
    device = heads.device
    low, high = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    a = mix((low + G * heads) & _WORD)
    c = mix(high ^ a)
    row_a = mix((a[..., None] + G * torch.arange(rows, device=device)) & _WORD)
    row_b = mix(c[..., None] ^ row_a)
    x = (row_a[..., None] + G * torch.arange(columns, device=device)) & _WORD
    x = ((x ^ (x >> 16)) * M1) & _WORD
    x = x ^ row_b[..., None]
    x = ((x ^ (x >> 15)) * M2) & _WORD
    return (x ^ (x >> 16)) >= threshold(dropout_p)
