"""3D convolutions of encoder, decoder and discriminator that train in half precision on a CPU too.

There oneDNN (3.11, processors with AVX-512) gives bf16 weight gradients that read memory that nobody wrote where a grid
is smaller than the kernel, e.g. a latent of 2 voxels under a 3³ kernel. Grids that small cost little in float32. A
transposed convolution has the gradients of the convolution that it reverses, so there the larger grid counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, C, D, H, W), in float32 on a CPU where an extent is smaller than the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, min(x.shape[-3:]) < self.kernel_size[0])


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with stride 2, (B, C, d, h, w), likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, 2 * min(x.shape[-3:]) < self.kernel_size[0])


def _run(convolve: Callable[[Tensor], Tensor], x: Tensor, is_small: bool) -> Tensor:
    if is_small and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float())
    return convolve(x)
