"""Volumes that are read in parts, from memory or from a file: their foreground, and crops of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dataset.volumes.intensity import BACKGROUND, foreground

MAX_VOXELS = 256  # foreground voxels that are remembered of a volume
STORED = {"int16": np.dtype("<i2"), "float32": np.dtype("<f4")}
CODE_SCALE = 32767  # int16 code of the value 1: -1, 0 and 1 are exact, the largest error is half a code, 1.6e-5


@dataclass(frozen=True)
class Foreground:
    """Where a volume is more than background. Indices are those of (D, H, W).

    first, last: (3,) int, the lowest and highest index of the foreground along each axis.
    voxels: (n, 3) int, up to 256 voxels of the foreground, the same ones every time.
    """

    first: np.ndarray
    last: np.ndarray
    voxels: np.ndarray


def find_foreground(mask: np.ndarray) -> Foreground:
    """The foreground of a volume. mask: (D, H, W) bool, somewhere true."""
    counts = np.count_nonzero(mask, axis=(1, 2))  # slice by slice: the indices of all voxels would be 8 bytes each
    if not counts.any():
        raise ValueError("a volume without foreground")
    lines = [np.flatnonzero(line) for line in (counts, mask.any(axis=(0, 2)), mask.any(axis=(0, 1)))]
    total = int(counts.sum())
    chosen = np.sort(np.random.default_rng(0).choice(total, min(total, MAX_VOXELS), replace=False))
    ends = np.cumsum(counts)
    slices = np.searchsorted(ends, chosen, side="right")
    voxels = []
    for d in np.unique(slices):
        places = np.flatnonzero(mask[d])[chosen[slices == d] - (ends[d] - counts[d])]
        rows, columns = np.unravel_index(places, mask.shape[1:])
        voxels.append(np.stack([np.full_like(rows, d), rows, columns], axis=1))
    first, last = (np.array([line[end] for line in lines]) for end in (0, -1))
    return Foreground(first, last, np.concatenate(voxels))


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values in [-1, 1] as they are stored: "float32" values, or "int16" codes.

    No voxel of the foreground becomes background by it.
    """
    if dtype == "int16":
        values = np.rint(values * np.float32(CODE_SCALE))
    return np.ascontiguousarray(values, dtype=STORED[dtype])


def decode(stored: np.ndarray) -> np.ndarray:
    """Stored values as float32 values in [-1, 1]: always a copy."""
    values = stored.astype(np.float32, order="C")
    if stored.dtype.kind == "i":
        values /= CODE_SCALE
    return values


@dataclass(eq=False)
class CroppedVolume:
    """A volume in the model's range of which crops are read.

    stored: (D, H, W) as `encode` gives it, for instance an array mapped from a file.
    affine: voxels (x, y, z) to mm, (4, 4) float64.
    known_foreground: None finds it when it is first asked for.
    """

    stored: np.ndarray
    affine: np.ndarray
    known_foreground: Foreground | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.stored.shape

    @cached_property
    def foreground(self) -> Foreground:
        return self.known_foreground or find_foreground(foreground(decode(self.stored)))

    def crop(self, start: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """(1, *size) float32, background where it lies outside of the volume. Reads no other part of it."""
        spans = [(int(first), int(first) + int(length)) for first, length in zip(start, size, strict=True)]
        inside = tuple(slice(max(a, 0), min(b, n)) for (a, b), n in zip(spans, self.shape, strict=True))
        data = decode(self.stored[inside])  # (d, h, w)
        if data.shape != tuple(size):
            padding = [(part.start - a, b - part.stop) for (a, b), part in zip(spans, inside, strict=True)]
            data = np.pad(data, padding, constant_values=BACKGROUND)
        return torch.from_numpy(data)[None]  # (1, d, h, w)
