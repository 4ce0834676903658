"""The 3D convolution of encoder, decoder and discriminator."""

import torch
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, which on a CPU stays in float32 under autocast where the input is less deep than the kernel.

    There oneDNN (3.11, processors with AVX-512) gives bf16 weight gradients that read memory that nobody wrote. Only
    the smallest grids are concerned, e.g. a latent of 2 voxels under a 3³ kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[-3] < self.kernel_size[0] and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())
        return super().forward(x)
