"""3D convolutions that train in half precision on a CPU too.

With an extent of 2, oneDNN's bfloat16 gradients of the weights (torch 2.12, AVX512) hold memory that nobody wrote, or
overwrite memory of others: those of 3³ kernels where the first extent is 2, those of 4³ kernels with stride 2 where the
second is. A transposed convolution has the gradients of the convolution that it reverses, so there the result counts.
Grids that small cost little: whatever has such an extent is computed in float32. Sampling has no such gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SMALLEST_EXTENT = 3  # of the larger grid of a convolution in half precision


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, C, d, h, w) to a grid of the same or of half the size."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, self.weight, min(x.shape[2:]))


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with stride 2, (B, C, d, h, w) to twice the grid."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, self.weight, 2 * min(x.shape[2:]))


def _run(convolve: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, extent: int) -> Tensor:
    """convolve(x), in float32 where an extent this small would spoil the gradients of the weights."""
    trains_in_half = x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    if not (trains_in_half and weight.requires_grad and extent < SMALLEST_EXTENT):
        return convolve(x)
    with torch.autocast("cpu", enabled=False):
        return convolve(x.float())
