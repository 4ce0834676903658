"""3D convolutions that on a CPU train in half precision too, and take the fast way for a single sample.

There oneDNN (3.11, processors with AVX-512) gives bf16 gradients of the weights that hold memory that nobody wrote, or
overwrites memory of others, where a grid is smaller than the kernel, e.g. a latent of 2 voxels under a 3³ kernel. Grids
that small cost little in float32. A transposed convolution has the gradients of the convolution that it reverses, so
there the larger grid counts. Without gradients of the weights there is no such fault.

For one sample of a small grid torch (2.12) leaves oneDNN for a convolution of its own, on one core, that takes two to
three times as long. Two halves of the grid are a batch of two, which it gives to oneDNN.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ELEMENTS = 20480  # B·C·D·H of a single sample up to which torch doesn't take oneDNN


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, C, D, H, W), that trains in float32 on a CPU where an extent is smaller than the kernel.

    A single sample is convolved in halves there, where that is faster; results differ by rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._is_faster_in_halves(x):
            return self._in_halves(x)
        return _run(super().forward, x, self.weight, min(x.shape[-3:]) < self.kernel_size[0])

    def _is_faster_in_halves(self, x: Tensor) -> bool:
        depth = x.shape[2]
        return (
            (x.device.type, x.dtype, len(x)) == ("cpu", torch.float32, 1)
            and not torch.is_autocast_enabled("cpu")
            and x.is_contiguous()
            and (self.kernel_size, self.stride, self.padding) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
            and depth % 2 == 0
            and depth >= 6  # of thinner halves the overlap is too large a part
            and x.shape[1] * depth * x.shape[3] <= FEW_ELEMENTS
        )

    def _in_halves(self, x: Tensor) -> Tensor:
        """(1, C, D, H, W): both halves along D with what the kernel sees of the other."""
        half = x.shape[2] // 2
        x = F.pad(x, (0, 0, 0, 0, 1, 1))  # (1, C, D + 2, H, W)
        halves = torch.cat([x[:, :, : half + 2], x[:, :, half:]])  # (2, C, D/2 + 2, H, W)
        y = F.conv3d(halves, self.weight, self.bias, padding=(0, 1, 1))  # (2, C', D/2, H, W)
        return torch.cat([y[:1], y[1:]], dim=2)


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
