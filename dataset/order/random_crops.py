"""Which part of a volume training takes, and how it is turned. All random numbers come from the caller's generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dataset.cache.crops import CroppedVolume
from dataset.volumes.intensity import foreground

MAX_DRAWS = 32  # crops tried before one is placed on a foreground voxel
SPARSE_SHARE = 0.1  # a crop with a smaller share of foreground counts as mostly background


def random_crop(
    volume: CroppedVolume, size: Sequence[int], rng: np.random.Generator, background_keep: float = 1.0
) -> tuple[tuple[int, int, int], torch.Tensor]:
    """A random crop of `size` that holds at least one voxel of the foreground: where it begins, and (1, *size) of it.

    Crops are drawn uniformly from those that overlap the foreground's box, hence uniformly among those with foreground.
    Crops mostly of background (less than 10 % foreground) are kept with the probability `background_keep`. After a few
    draws without success it takes the fullest crop seen, or places one on a known voxel of the foreground: there is no
    endless redrawing. Only the crops that are drawn are read.

    A volume shorter than `size` along an axis lies in the middle of its crops, with background around it.
    """
    size = np.array(size)
    lowest, highest = _crop_starts(volume.shape, size)
    if not np.array_equal(lowest, highest):
        lowest = np.maximum(lowest, volume.foreground.first - size + 1)
        highest = np.minimum(highest, volume.foreground.last)
    if np.array_equal(lowest, highest):
        return tuple(lowest.tolist()), volume.crop(lowest, size)
    best_share, best = 0.0, None
    for _ in range(MAX_DRAWS):
        start = rng.integers(lowest, highest + 1)
        crop = volume.crop(start, size)
        share = np.count_nonzero(foreground(crop.numpy())) / crop.numel()  # several times as fast as with torch
        if share >= SPARSE_SHARE or (share > 0 and rng.random() < background_keep):
            return tuple(start.tolist()), crop
        if share > best_share:
            best_share, best = share, (tuple(start.tolist()), crop)
    if best is not None:
        return best
    voxel = rng.choice(volume.foreground.voxels)
    start = rng.integers(np.maximum(voxel - size + 1, lowest), np.minimum(voxel, highest) + 1)
    return tuple(start.tolist()), volume.crop(start, size)


def _crop_starts(shape: Sequence[int], size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest start of a crop; along an axis shorter than it the one that has the volume in its middle.

    That start is negative: so many voxels of background come first.
    """
    spare = np.array(shape) - size
    front = -(np.maximum(-spare, 0) // 2)
    return front, np.where(spare > 0, spare, front)


def centre_crop_start(shape: Sequence[int], size: Sequence[int]) -> tuple[int, int, int]:
    """Where the crop of `size` in the middle of a volume begins."""
    return tuple((extent - length) // 2 for extent, length in zip(shape, size, strict=True))


@dataclass(frozen=True)
class Turn:
    """Flips of the NIfTI axes x and y, which are H and W, then a quarter turn in their plane.

    Where H and W differ there is no turn: it would change the shape, and with it which volumes can share a batch.
    """

    flip_h: bool = False
    flip_w: bool = False
    quarter: bool = False

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Turn":
        """Each with probability 1/2."""
        return cls(*(rng.random(3) < 0.5).tolist())

    def apply(self, data: torch.Tensor) -> torch.Tensor:
        """(1, D, H, W), turned."""
        flipped = [axis for axis, chosen in ((-2, self.flip_h), (-1, self.flip_w)) if chosen]
        if flipped:
            data = data.flip(flipped)
        if self.quarter and data.shape[-2] == data.shape[-1]:
            data = data.rot90(1, (-2, -1))
        return data.contiguous()

    def affine(self, affine: np.ndarray, size: Sequence[int]) -> np.ndarray:
        """That of turned data, by the one of the data (4, 4), voxels (x, y, z) to mm. size: (D, H, W)."""
        last_x, last_y = size[1] - 1, size[2] - 1
        before = np.eye(4)  # turned voxels -> flipped voxels -> those of the data
        if self.quarter and last_x == last_y:
            before[:2] = [[0, 1, 0, 0], [-1, 0, 0, last_y]]
        if self.flip_h:
            before = np.array([[-1, 0, 0, last_x], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ before
        if self.flip_w:
            before = np.array([[1, 0, 0, 0], [0, -1, 0, last_y], [0, 0, 1, 0], [0, 0, 0, 1]]) @ before
        return affine @ before
