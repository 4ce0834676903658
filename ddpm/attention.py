"""Attention within sub-volumes, with heads as wide as fast kernels want them."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT_BYTES = 16  # fused kernels on a GPU take heads whose width is a multiple of it, vector units like it too


class PatchAttention(nn.Module):
    """Multi-head self-attention among the tokens of a sub-volume, (B·N, T, C) to the same shape.

    As `timm.layers.Attention` with biases, names of the parameters included, but for the padding of `attend`.

    Args:
        dim: width of a token, C.
        num_heads: a divisor of dim.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B·N, T, 3, heads, C/heads)
        return self.proj(attend(qkv).flatten(2))  # (B·N, T, C)


def attend(qkv: Tensor) -> Tensor:
    """Attention of queries, keys and values in one tensor (B, T, 3, heads, E), giving (B, T, heads, E).

    Heads are filled up with zeros to a multiple of 16 bytes: those of the paper have 9 channels, for which a GPU takes
    its slowest kernel and a CPU nearly twice the time. Zeros add nothing to the products of queries and keys, whose
    scale stays that of E, and the values' zeros come out as zeros, which are cut off: nothing but rounding changes.
    """
    width = qkv.shape[-1]
    padding = -width % (ALIGNMENT_BYTES // qkv.element_size())
    q, k, v = F.pad(qkv, (0, padding)).permute(2, 0, 3, 1, 4)  # (B, heads, T, E + padding) each
    x = F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(width))
    return x[..., :width].transpose(1, 2)  # (B, T, heads, E)
