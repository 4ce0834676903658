"""LPIPS v0.1 on VGG-16 (Zhang et al., CVPR 2018) and its tri-planar form for volumes (paper, section III-A).

Axes: B batch, C channels, (D, H, W) voxels with D = z, H = x, W = y; N slices, (h, w) the extent of a slice.
"""

from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from AutoEncoder.model.lpips_weights import load_head_weights, load_vgg_weights

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five slices of VGG-16
CONVS_PER_SLICE = (2, 2, 3, 3, 3)
MIN_EXTENT = 16  # four poolings by 2
SHIFT = (-0.030, -0.088, -0.188)  # ImageNet's mean and deviation for images in [-1, 1], as LPIPS v0.1 has them
SCALE = (0.458, 0.448, 0.450)


class VGG16Features(nn.Module):
    """The convolutions of VGG-16, cut after the ReLUs relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

    Layers keep the number they have in torchvision's `features`, so `slice2.5.weight` is `features.5.weight` there.
    """

    def __init__(self) -> None:
        super().__init__()
        number, in_width = 0, 3
        for i, (width, num_convs) in enumerate(zip(WIDTHS, CONVS_PER_SLICE, strict=True), start=1):
            layers = nn.Sequential()
            if i > 1:
                layers.add_module(str(number), nn.MaxPool2d(2))
                number += 1
            for _ in range(num_convs):
                layers.add_module(str(number), nn.Conv2d(in_width, width, 3, padding=1))
                layers.add_module(str(number + 1), nn.ReLU(inplace=True))
                number, in_width = number + 2, width
            self.add_module(f"slice{i}", layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, h, w) -> five feature maps (N, WIDTHS[i], h / 2^i, w / 2^i)."""
        features = []
        for i in range(1, len(WIDTHS) + 1):
            x = getattr(self, f"slice{i}")(x)  # (N, WIDTHS[i-1], h / 2^(i-1), w / 2^(i-1))
            features.append(x)
        return features


class ScalingLayer(nn.Module):
    """(N, 3, h, w) in [-1, 1] -> the same standardised as VGG's training images were."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.scale


def normalise_channels(features: Tensor, eps: float) -> Tensor:
    """f / (‖f‖₂ + eps) at each pixel, in float32 whatever the autocast type.

    `vector_norm` has gradient 0 where all channels are 0; the square root of the sum of squares would give NaN there.
    """
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + eps)


class EvalModule(nn.Module):
    """A module that stays in eval mode, whatever a parent module is switched to."""

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


class LPIPS(EvalModule):
    """Perceptual distance of 2D slices, LPIPS v0.1 with the VGG-16 backbone.

    Frozen and always in eval mode; gradients flow to the inputs only.

    Args:
        weights_dir: folder with `vgg16-397923af.pth` and / or `vgg.pth`; None: see `lpips_weights`.
        pretrained: False gives the network with random weights (tests, or a state dict loaded afterwards).

    Raises:
        ValueError: weight files are missing, unreadable or of another network.
    """

    def __init__(self, weights_dir: str | Path | None = None, pretrained: bool = True) -> None:
        super().__init__()
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, width in enumerate(WIDTHS):
            # One non-negative weight per channel: a 1x1 convolution. The dropout only keeps the published name.
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{i}", nn.ModuleDict({"model": head}))
        if pretrained:
            # The heads first: they are small, so that a mistake shows before half a gigabyte is fetched.
            for weights in (load_head_weights(self, weights_dir), load_vgg_weights(self, weights_dir)):
                self.load_state_dict(weights, strict=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Slices (N, 1, h, w) or (N, 3, h, w) in [-1, 1] -> distances (N, 1, 1, 1). One channel is repeated to three.

        Raises:
            ValueError: other shapes, or an extent below 16 pixels.
        """
        check_slices(x, y)
        features_y = self.net(self.scaling_layer(y.expand(-1, 3, -1, -1)))
        features_x = self.net(self.scaling_layer(x.expand(-1, 3, -1, -1)))
        distance = x.new_zeros((), dtype=torch.float32)
        for i, (fx, fy) in enumerate(zip(features_x, features_y, strict=True)):
            difference = (normalise_channels(fx, 1e-10) - normalise_channels(fy, 1e-10)) ** 2  # (N, WIDTHS[i], h', w')
            weighted = self.get_submodule(f"lin{i}.model")(difference)  # (N, 1, h', w')
            distance = distance + weighted.float().mean(dim=(2, 3), keepdim=True)  # (N, 1, 1, 1)
        return distance


def check_slices(x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless both are (N, 1 or 3, h, w) of the same shape, with h, w >= 16."""
    if x.shape != y.shape:
        raise ValueError(f"LPIPS compares slices of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"LPIPS needs slices (N, 1 or 3, h, w), got {tuple(x.shape)}")
    if min(x.shape[2:]) < MIN_EXTENT:
        raise ValueError(
            f"LPIPS needs slices of at least {MIN_EXTENT} x {MIN_EXTENT} pixels, got {x.shape[2]} x {x.shape[3]}: "
            "take larger patches or set model.perceptual_weight=0"
        )


class TriplanarLPIPS(EvalModule):
    """LPIPS on slices across all three axes of a volume, summed over the axes (paper, section III-A).

    Args:
        weights_dir, pretrained: as in `LPIPS`.
        fraction: share of an axis' slices that each call draws at random (rounded, at least one); 1.0: all of them.
        chunk_pixels: most pixels that go through the network at once, about 2 kB of memory each. An axis whose
            slices exceed it is taken in chunks that are computed again in the backward pass, which bounds its memory.
    """

    def __init__(
        self, weights_dir: str | Path | None = None, pretrained: bool = True, *, fraction=0.2, chunk_pixels=2**21
    ) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is the share of slices to compare, in (0, 1], got {fraction}")
        self.lpips = LPIPS(weights_dir, pretrained)
        self.fraction = fraction
        self.chunk_pixels = chunk_pixels
        self.eval()

    def forward(self, x: Tensor, y: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Volumes (B, 1 or 3, D, H, W) in [-1, 1] -> scalar: sum over the axes of the mean distance of the slices.

        Args:
            generator: CPU generator that draws the slices (the same in both volumes and all of the batch);
                None: the global one.

        Raises:
            ValueError: shapes differ or are not those of volumes, or an extent is below 16 voxels.
        """
        if x.shape != y.shape or x.ndim != 5:
            raise ValueError(
                "tri-planar LPIPS needs two volumes (B, C, D, H, W) of one shape, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        loss = x.new_zeros((), dtype=torch.float32)
        for axis in (2, 3, 4):
            chosen = self.draw_slices(x.shape[axis], generator)
            if x.is_cuda:  # from pinned memory the host need not wait for what the GPU has still to do
                chosen = chosen.pin_memory().to(x.device, non_blocking=True)
            loss = loss + self.mean_distance(take_slices(x, axis, chosen), take_slices(y, axis, chosen))
        return loss

    def draw_slices(self, num_slices: int, generator: torch.Generator | None) -> Tensor:
        """Sorted indices (k,) of different slices, k = max(1, round(fraction · num_slices))."""
        count = max(1, round(self.fraction * num_slices))
        return torch.randperm(num_slices, generator=generator)[:count].sort().values

    def mean_distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Slices (N, C, h, w) -> scalar, the mean of their distances, chunk by chunk."""
        per_chunk = max(1, self.chunk_pixels // (x.shape[2] * x.shape[3]))
        if x.shape[0] <= per_chunk:
            return self.lpips(x, y).mean()
        chunks = zip(x.split(per_chunk), y.split(per_chunk), strict=True)
        distances = [checkpoint(self.lpips, cx, cy, use_reentrant=False, preserve_rng_state=False) for cx, cy in chunks]
        return torch.cat(distances).mean()


def take_slices(volume: Tensor, axis: int, indices: Tensor) -> Tensor:
    """(B, C, D, H, W), k indices on `axis` -> (B·k, C, h, w), h and w the two other axes in order."""
    slices = volume.index_select(axis, indices).movedim(axis, 1)  # (B, k, C, h, w)
    return rearrange(slices, "b k c h w -> (b k) c h w")
