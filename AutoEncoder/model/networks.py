"""Encoder and decoder of the Patch-Volume autoencoder (paper, section III-A).

Axes: B batch, C channels, (D, H, W) voxels, (d, h, w) = (D, H, W)/f latent grid, E latent channels, n tokens = d·h·w.
Attribute names are those of the published checkpoints.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.convolution import Conv3d, ConvTranspose3d

Norm = Callable[[int], nn.Module]  # channels -> `normalize` of the configured type and groups

ATTENTION_HEADS = 4
ATTENTION_HEAD_DIM = 32


def num_downsamplings(downsample: Sequence[int]) -> int:
    """How often the resolution is halved: log2 of the compression, which is the same power of two on all three axes.

    Raises:
        ValueError: not three equal powers of two, each at least 2.
    """
    factors = [int(factor) for factor in downsample]
    if len(factors) != 3 or len(set(factors)) != 1 or factors[0] < 2 or factors[0] & (factors[0] - 1):
        raise ValueError(f"downsample is {factors}, expected three equal powers of two such as [8, 8, 8] or [4, 4, 4]")
    return int(math.log2(factors[0]))


def level_widths(n_hiddens: int, levels: int) -> list[int]:
    """Channels of the levels 0 … k: they double at every halving but the last (n, 2n, …, 2^(k-1)n, 2^(k-1)n)."""
    return [n_hiddens * 2 ** min(level, levels - 1) for level in range(levels + 1)]


def normalize(channels: int, norm_type: str, num_groups: int) -> nn.Module:
    """The normalisation layer: "group" is GroupNorm(num_groups, eps 1e-6), "batch" is SyncBatchNorm.

    Raises:
        ValueError: unknown type, or channels that do not divide into the groups.
    """
    if norm_type == "group":
        if channels % num_groups:
            raise ValueError(
                f"num_groups {num_groups} does not divide {channels} channels: choose n_hiddens as a multiple of it"
            )
        return nn.GroupNorm(num_groups, channels, eps=1e-6)
    if norm_type == "batch":
        return nn.SyncBatchNorm(channels)
    raise ValueError(f"norm_type is {norm_type!r}, expected 'group' or 'batch'")


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, in, D, H, W) -> (B, out, D, H, W); a 1³ shortcut where the width changes.

    With `recomputes` set, what the backward pass needs from inside the block is computed again there, not kept.
    """

    recomputes = False

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        if in_channels != out_channels:
            self.resConv = Conv3d(in_channels, out_channels, kernel_size=1)
        self.norm1 = norm(in_channels)
        self.conv1 = Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = Conv3d(out_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputes and self.training and torch.is_grad_enabled():
            return checkpoint(self._run, x, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, out, D, H, W)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, out, D, H, W)
        return h + self.shortcut(x)

    def shortcut(self, x: Tensor) -> Tensor:
        """What the block adds to, (B, in, D, H, W) -> (B, out, D, H, W): its input, widened where needed."""
        return self.resConv(x) if hasattr(self, "resConv") else x


class AttentionBlock(nn.Module):
    """Full self-attention over all voxels of a small grid, added to its input, (B, C, d, h, w) -> the same shape."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        inner = ATTENTION_HEADS * ATTENTION_HEAD_DIM
        self.norm = norm(channels)
        self.to_qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.to_out = Conv3d(inner, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = x.shape[-3:]
        tokens = rearrange(self.norm(x), "b c d h w -> b (d h w) c")
        qkv = self.to_qkv(tokens)  # (B, n, 3·heads·32)
        q, k, v = rearrange(qkv, "b n (three heads c) -> three b heads n c", three=3, heads=ATTENTION_HEADS)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, n, 32); its default scale is 1/√32
        out = rearrange(out, "b heads (d h w) c -> b (heads c) d h w", d=d, h=h, w=w)
        return x + self.to_out(out)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the latent resolution; shape unchanged."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.res1 = ResBlock(channels, channels, norm)
        self.attn = AttentionBlock(channels, norm)
        self.res2 = ResBlock(channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.res2(self.attn(self.res1(x)))


class Upsample(nn.Module):
    """Doubles the resolution, (B, C, d, h, w) -> (B, C, 2d, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_trans = ConvTranspose3d(channels, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_trans(x)


class Level(nn.Module):
    """Two residual blocks and, on all but the last level, the change of resolution called `resample_name`."""

    def __init__(
        self, in_channels: int, out_channels: int, norm: Norm, resample_name: str, resample: nn.Module | None
    ) -> None:
        super().__init__()
        self.res1 = ResBlock(in_channels, out_channels, norm)
        self.res2 = ResBlock(out_channels, out_channels, norm)
        self.resample_name = resample_name
        if resample is not None:
            self.add_module(resample_name, resample)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res2(self.res1(x))
        return getattr(self, self.resample_name)(x) if hasattr(self, self.resample_name) else x


class Encoder(nn.Module):
    """Image (B, image_channels, D, H, W) -> (B, E, D/f, H/f, W/f), f = the compression."""

    def __init__(
        self, n_hiddens: int, downsample: Sequence[int], image_channels: int, embedding_dim: int, norm: Norm
    ) -> None:
        super().__init__()
        levels = num_downsamplings(downsample)
        widths = level_widths(n_hiddens, levels)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            down = Conv3d(width, width, kernel_size=4, stride=2, padding=1) if i < levels else None
            self.conv_blocks.append(Level(widths[max(i - 1, 0)], width, norm, "down", down))
        self.conv_first = Conv3d(image_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block = MidBlock(widths[-1], norm)
        self.final_block = nn.Sequential(norm(widths[-1]), nn.SiLU(), Conv3d(widths[-1], embedding_dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_first(x)  # (B, w0, D, H, W)
        for block in self.conv_blocks:
            h = block(h)  # (B, wi, D/2^(i+1), H/2^(i+1), W/2^(i+1)); the last keeps D/f, H/f, W/f
        return self.final_block(self.mid_block(h))  # (B, E, d, h, w)


class ImageHead(nn.Sequential):
    """Norm, SiLU and the convolution to intensities, (B, C, D, H, W) -> (B, image_channels, D, H, W).

    In the precision of their weights under autocast too: in bf16 a volume of 64³ would have some 2,000 different
    values, and show bands where it is smooth.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self[-1].weight.dtype))

    def convolve(self, activated: Tensor) -> Tensor:
        """The convolution alone, of what is normed and activated in full precision."""
        with torch.autocast(activated.device.type, enabled=False):
            return self[-1](activated)


class Decoder(nn.Module):
    """(B, E, d, h, w) -> image (B, image_channels, f·d, f·h, f·w), float32 under autocast too."""

    def __init__(
        self, n_hiddens: int, upsample: Sequence[int], image_channels: int, embedding_dim: int, norm: Norm
    ) -> None:
        super().__init__()
        levels = num_downsamplings(upsample)
        widths = level_widths(n_hiddens, levels)[::-1]
        self.conv_first = Conv3d(embedding_dim, widths[0], kernel_size=3, padding=1)
        self.mid_block = MidBlock(widths[0], norm)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            up = Upsample(width) if i < levels else None
            self.conv_blocks.append(Level(widths[max(i - 1, 0)], width, norm, "up", up))
        self.final_block = ImageHead(norm(widths[-1]), nn.SiLU(), Conv3d(widths[-1], image_channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_first(z))  # (B, w0, d, h, w)
        for block in self.conv_blocks:
            h = block(h)  # (B, wi, 2^(i+1)·d, …); the last keeps f·d, f·h, f·w
        return self.final_block(h)  # (B, image_channels, f·d, f·h, f·w)
