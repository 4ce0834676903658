"""3D convolutions that on a CPU train in half precision too, and take the fast way for single samples and few channels.

There oneDNN (3.11, processors with AVX-512) gives bf16 gradients of the weights that hold memory that nobody wrote, or
overwrites memory of others, where a grid is smaller than the kernel, e.g. a latent of 2 voxels under a 3³ kernel. Grids
that small cost little in float32. A transposed convolution has the gradients of the convolution that it reverses, so
there the larger grid counts. Without gradients of the weights there is no such fault.

For one sample of a small grid torch (2.12) leaves oneDNN for a convolution of its own, on one core, that takes two to
three times as long. Two halves of the grid are a batch of two, which it gives to oneDNN.

The gradients of a convolution of few channels take oneDNN two to four times as long as with the channels last.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ELEMENTS = 20480  # B·C·D·H of a single sample up to which torch doesn't take oneDNN
FEW_CHANNELS, MANY_VOXELS = 32, 8192  # from which on (B·D·H·W) gradients of so few channels are faster with them last


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, (B, C, D, H, W), that trains in float32 on a CPU where an extent is smaller than the kernel.

    A single sample is convolved in halves there, and gradients of few channels are computed with the channels last,
    where that is faster; results differ by rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._is_plain(x):
            if self._is_faster_in_halves(x):
                return self._in_halves(x)
            if self._has_faster_gradients(x):
                return _FewChannels.apply(x, self.weight, self.bias, 1, self.padding)
        return _run(super().forward, x, self.weight, min(x.shape[-3:]) < self.kernel_size[0])

    def _is_plain(self, x: Tensor) -> bool:
        """A 3³ kernel that keeps the grid, on a CPU in float32."""
        return (
            (x.device.type, x.dtype) == ("cpu", torch.float32)
            and not torch.is_autocast_enabled("cpu")
            and x.is_contiguous()
            and (self.kernel_size, self.stride, self.padding) == ((3, 3, 3), (1, 1, 1), (1, 1, 1))
        )

    def _has_faster_gradients(self, x: Tensor) -> bool:
        few = 1 < self.in_channels <= FEW_CHANNELS and self.out_channels <= FEW_CHANNELS
        return few and torch.is_grad_enabled() and x.numel() // self.in_channels >= MANY_VOXELS

    def _is_faster_in_halves(self, x: Tensor) -> bool:
        depth = x.shape[2]
        return (
            len(x) == 1
            and depth % 2 == 0
            and depth >= 6  # of thinner halves the overlap is too large a part
            and x.shape[1] * depth * x.shape[3] <= FEW_ELEMENTS
        )

    def _in_halves(self, x: Tensor) -> Tensor:
        """(1, C, D, H, W): both halves along D with what the kernel sees of the other."""
        half = x.shape[2] // 2
        x = F.pad(x, (0, 0, 0, 0, 1, 1))  # (1, C, D + 2, H, W)
        halves = torch.cat([x[:, :, : half + 2], x[:, :, half:]])  # (2, C, D/2 + 2, H, W)
        convolve = _FewChannels.apply if self._has_faster_gradients(x) else F.conv3d
        y = convolve(halves, self.weight, self.bias, 1, (0, 1, 1))  # (2, C', D/2, H, W)
        return torch.cat([y[:1], y[1:]], dim=2)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with stride 2, (B, C, d, h, w) to twice the grid, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        return _run(super().forward, x, self.weight, 2 * min(x.shape[-3:]) < self.kernel_size[0])


class _FewChannels(torch.autograd.Function):
    """`F.conv3d` of float32 on a CPU, whose gradients are computed with the channels last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv3d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (grad, *ctx.saved_tensors))
        options = ([ctx.stride] * 3, ctx.padding, [1] * 3, False, [0] * 3, 1)
        found = torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *options, ctx.needs_input_grad[:3])
        return *(t if t is None else t.contiguous() for t in found), None, None


def _run(convolve: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, is_small: bool) -> Tensor:
    trains_in_half = torch.is_grad_enabled() and weight.requires_grad and torch.is_autocast_enabled("cpu")
    if is_small and x.device.type == "cpu" and trains_in_half:
        with torch.autocast("cpu", enabled=False):
            return convolve(x.float())
    return convolve(x)
