"""Uncompressed copies of latents, made once, of which whole batches are read into one tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from dataset.cache.entry import CacheEntry, header_bytes
from dataset.cache.volumes import FileCache
from dataset.volumes.volume_io import read_latent, read_latent_header


@dataclass(frozen=True)
class CachedLatent:
    """A sound entry; shape: (C, d, h, w)."""

    array: Path
    shape: tuple[int, int, int, int]


class LatentCache(FileCache):
    """The cache of latents, float32, equal to the files bit for bit. `build` refuses what `read_latent` refuses.

    settings, read, shape_of: as of `FileCache`, for what is made of other files, such as hints.
    """

    noun = "latent"
    options = ""
    dtypes = ("float32",)

    def __init__(
        self,
        cache_dir: str | Path | None = None,
        limit_gb: float | None = None,
        settings: str = "float32",
        read: Callable[[Path], tuple[np.ndarray, dict[str, Any]]] | None = None,
        shape_of: Callable[[Path], tuple[int, ...]] | None = None,
    ):
        super().__init__("float32", settings, cache_dir, limit_gb, read or _read, _of_record, shape_of or _latent_shape)

    def read_into(self, path: Path, latent: torch.Tensor) -> torch.Tensor:
        """Fills and returns a contiguous tensor (C, d, h, w), float32, with a latent that was given to `build`.

        Plain reading rather than a mapped file: it leaves the interpreter to other threads, and the pages of a mapping
        would have to be faulted in one by one. UserError if the entry is gone or cut off.
        """
        found = self._find(path)
        assert latent.shape == found.shape, f"{found.array}: {found.shape} into {tuple(latent.shape)}"
        left = memoryview(latent.numpy()).cast("B")
        try:
            with found.array.open("rb", buffering=0) as file:
                file.seek(header_bytes(found.shape, self.dtype))
                while count := file.readinto(left):  # mostly all at once; 0 at the end
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{found.array}: cached latent lost during training ({error}): start again") from error
        if left:
            raise UserError(f"{found.array}: cached latent lost during training (truncated): start again")
        return latent


def _read(source: Path) -> tuple[np.ndarray, dict[str, Any]]:
    return read_latent(source).numpy(), {}  # (C, d, h, w)


def _of_record(entry: CacheEntry, record: dict[str, Any]) -> CachedLatent:
    channels, depth, height, width = record["shape"]
    return CachedLatent(entry.array, (channels, depth, height, width))


def _latent_shape(path: Path) -> tuple[int, ...]:
    return read_latent_header(path).latent_shape
