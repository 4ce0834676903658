"""Hints of a ControlNet: from a file to what it is told, on the grid of the latents.

| kind | files | hint |
|---|---|---|
| image | latents of other volumes, by the same autoencoder | these, (C, d, h, w) |
| mask | label maps, on the grid of the volumes | the share of each listed label in each latent voxel, or of each bit |
| latent | ready-made, on the latent grid | these |
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError
from dataset.volumes.geometry import size_text
from dataset.volumes.volume_io import read_header, read_latent, read_latent_header, read_volume

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class LatentHint:
    """Latents, ready-made or of images. is_image: they are normalised as the latents that are generated."""

    name: str
    channels: int
    is_image: bool

    @property
    def settings(self) -> str:
        """What its values depend on beside the file, as a name."""
        return "float32"

    def check(self, path: Path, grid: Grid) -> None:
        """UserError where the file can't be the hint of a latent of this grid (d, h, w). Reads its header."""
        channels, *found = read_latent_header(path).latent_shape
        if (channels, tuple(found)) != (self.channels, tuple(grid)):
            raise UserError(
                f"{path}: hint {self.name} has {channels} channels on the grid {size_text(found)}, {self.channels} on "
                f"{size_text(grid)} are needed, as of the latents: make it again from volumes on their grid"
            )

    def read(self, path: Path, grid: Grid) -> Tensor:
        """(channels, d, h, w) float32. Errors as of `read_latent`."""
        return read_latent(path)


@dataclass(frozen=True)
class MaskHint:
    """Label maps. labels: by their names; bits: their numbers' bits in place of a channel for each."""

    name: str
    labels: tuple[tuple[str, int], ...]
    bits: bool = False
    is_image = False

    @property
    def values(self) -> list[int]:
        return [value for _, value in self.labels]

    @property
    def channels(self) -> int:
        return max(self.values).bit_length() if self.bits else len(self.labels)

    @property
    def settings(self) -> str:
        return f"float32_{'bits' if self.bits else 'labels'}_{'-'.join(map(str, self.values))}"

    def check(self, path: Path, grid: Grid) -> None:
        self._factor(path, read_header(path).tensor_shape, grid)

    def read(self, path: Path, grid: Grid) -> Tensor:
        """Shares from 0 to 1, (channels, d, h, w). UserError: labels that are not listed, nothing but background."""
        return self.of_labels(read_volume(path).data[0], grid, path)

    def of_labels(self, labels: Tensor, grid: Grid, path: Path) -> Tensor:
        """Of a label map (D, H, W); path: for messages."""
        factor = self._factor(path, labels.shape, grid)
        found = labels.unique().tolist()
        if strange := [value for value in found if value and value not in self.values]:
            raise UserError(
                f"{path}: label {strange[0]:g} is not among those of hint {self.name} ({self._listed}): list it, or "
                "set its voxels to 0"
            )
        if found == [0]:
            raise UserError(f"{path}: an empty mask: every voxel is 0, hint {self.name} would say nothing")
        whole = labels.round().long()
        if self.bits:
            planes = torch.stack([(whole >> bit) & 1 for bit in range(self.channels)])
        else:
            planes = torch.stack([whole == value for value in self.values])
        ends = [size * factor - have for size, have in zip(grid, labels.shape, strict=True)]  # padded as the volumes
        padded = F.pad(planes.float(), [0, ends[2], 0, ends[1], 0, ends[0]])
        return F.avg_pool3d(padded, factor)  # (channels, d, h, w)

    def _factor(self, path: Path, shape: Sequence[int], grid: Grid) -> int:
        """Voxels of the map along an edge of a latent voxel."""
        ratio = max(have / size for have, size in zip(shape, grid, strict=True))
        factor = 2 ** math.ceil(math.log2(max(ratio, 1)))
        if factor > 8 or any(math.ceil(have / factor) > size for have, size in zip(shape, grid, strict=True)):
            raise UserError(
                f"{path}: hint {self.name} has {size_text(shape)} voxels, which do not lie on the latent grid "
                f"{size_text(grid)}: give masks on the grid of the volumes"
            )
        return factor

    @property
    def _listed(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.labels)


HintReader = LatentHint | MaskHint


def hints_of(rows: Sequence[Mapping], volume_channels: int) -> list[HintReader]:
    """Those of a config's `hints`, in their order."""
    found: list[HintReader] = []
    for row in rows:
        if row["kind"] == "mask":
            labels = sorted(row["labels"].items(), key=lambda item: item[1])
            found.append(MaskHint(row["name"], tuple(labels), row["bits"]))
        else:
            is_image = row["kind"] == "image"
            found.append(LatentHint(row["name"], row["channels"] or volume_channels, is_image))
    return found
