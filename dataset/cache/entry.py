"""One file of the cache: `NAME.npy`, its voxels as they are mapped into memory, and `NAME.json`, what they are.

The JSON is written last. An entry counts only while it agrees with the source, the `.nii.gz`, and with the `.npy`.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from common.documents import read_json
from common.errors import UserError
from common.files import write_atomically
from dataset.cache.crops import STORED, CroppedVolume, Foreground, decode, encode, find_foreground
from dataset.volumes.intensity import foreground
from dataset.volumes.volume_io import read_model_volume

VERSION = 1  # of the format: entries of another one are made again
RECORD_BYTES = 8192  # about the largest JSON


@dataclass(frozen=True)
class CacheEntry:
    """Where a volume or latent is cached."""

    source: Path  # its `.nii.gz`
    array: Path  # the `.npy`, with the JSON beside it
    dtype: str  # "int16" or "float32"

    @property
    def record(self) -> Path:
        return self.array.with_suffix(".json")


@dataclass(frozen=True)
class CachedVolume:
    """What a sound entry says of its volume; shape: (D, H, W), affine: (4, 4) float64."""

    entry: CacheEntry
    shape: tuple[int, int, int]
    affine: np.ndarray
    foreground: Foreground

    @classmethod
    def of_record(cls, entry: CacheEntry, record: dict[str, Any]) -> "CachedVolume":
        """By the record of `read_volume_for_cache`; ValueError, KeyError or TypeError for one of another form."""
        area = Foreground(*(np.array(record[name], dtype=np.int32) for name in ("first", "last", "voxels")))
        return cls(entry, tuple(record["shape"]), np.array(record["affine"], dtype=np.float64), area)

    def open(self) -> CroppedVolume:
        """The volume, of which only what is asked for is read. UserError if the file is gone."""
        path, dtype = self.entry.array, self.entry.dtype
        try:
            stored = np.memmap(path, STORED[dtype], "r", header_bytes(self.shape, dtype), self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cached volume lost during training ({error}): start again") from error
        return CroppedVolume(np.asarray(stored), self.affine, self.foreground)


def read_volume_for_cache(source: Path, dtype: str, intensity_range: tuple[float, float]) -> tuple[np.ndarray, dict]:
    """The voxels (D, H, W) of a volume as they are stored, and what the record says of them.

    UserError: as `read_model_volume`.
    """
    volume = read_model_volume(source, intensity_range)
    stored = encode(volume.data[0].numpy(), dtype)  # (D, H, W)
    found = find_foreground(foreground(decode(stored)))
    area = {"first": found.first.tolist(), "last": found.last.tolist(), "voxels": found.voxels.tolist()}
    return stored, {"affine": volume.affine.tolist(), **area}


def write_entry(entry: CacheEntry, read: Callable[[Path], tuple[np.ndarray, dict[str, Any]]]) -> None:
    """Caches what `read` gives for the source: a contiguous array of the entry's type, and further facts to record.

    UserError: as `read`, or if it can't be written.
    """
    state = entry.source.stat()  # before reading: a file that changes meanwhile does not agree with it later
    stored, facts = read(entry.source)
    record = {
        "version": VERSION,
        "source_size": state.st_size,
        "source_mtime_ns": state.st_mtime_ns,
        "shape": stored.shape,
        **facts,
    }
    entry.record.unlink(missing_ok=True)  # else it could come to vouch for other voxels
    write_atomically(entry.array, _array_header(stored.shape, entry.dtype), stored.data)
    write_atomically(entry.record, json.dumps(record, separators=(",", ":")).encode())


def read_entry(entry: CacheEntry, of_record: Callable[[CacheEntry, dict[str, Any]], Any]) -> Any | None:
    """What `of_record` makes of a sound entry of the present source, or None."""
    try:
        state = entry.source.stat()
        record = read_json(entry.record)
        size = array_bytes(record["shape"], entry.dtype)
        found = (record["version"], record["source_size"], record["source_mtime_ns"], entry.array.stat().st_size)
        if found != (VERSION, state.st_size, state.st_mtime_ns, size):
            return None
        return of_record(entry, record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def entry_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size of both files."""
    return array_bytes(shape, dtype) + RECORD_BYTES


def array_bytes(shape: Sequence[int], dtype: str) -> int:
    """Size of the `.npy` of an array."""
    return header_bytes(shape, dtype) + prod(shape) * STORED[dtype].itemsize


def header_bytes(shape: Sequence[int], dtype: str) -> int:
    """Where in the `.npy` the voxels begin."""
    return len(_array_header(shape, dtype))


def _array_header(shape: Sequence[int], dtype: str) -> bytes:
    stream = io.BytesIO()
    description = {"descr": STORED[dtype].str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
