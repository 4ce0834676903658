"""3D convolutions that train in half precision on a CPU too.

There oneDNN (3.11, processors with AVX-512) gives bf16 gradients of the weights that hold memory that nobody wrote, or
overwrites memory of others, where a grid is smaller than the kernel, e.g. a latent of 2 voxels under a 3³ kernel. Grids
that small cost little in float32. A transposed convolution has the gradients of the convolution that it reverses, so
there the larger grid counts. Without gradients of the weights there is no such fault.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, C, D, H, W), that trains in float32 on a CPU where an extent is smaller than the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, self.weight, min(x.shape[-3:]) < self.kernel_size[0])


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with stride 2, (B, C, d, h, w) to twice the grid, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, self.weight, 2 * min(x.shape[-3:]) < self.kernel_size[0])


def _run(convolve: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, is_small: bool) -> Tensor:
    trains_in_half = torch.is_grad_enabled() and weight.requires_grad and torch.is_autocast_enabled("cpu")
    if is_small and x.device.type == "cpu" and trains_in_half:
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float())
    return convolve(x)
