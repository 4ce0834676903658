"""One volume of the cache: `NAME.npy`, its voxels as they are mapped into memory, and `NAME.json`, what they are.

The JSON is written last. An entry counts only while the JSON agrees with the volume's file and with the `.npy`.
"""

import io
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from config.errors import UserError
from dataset.crops import STORED, CroppedVolume, Foreground, decode, encode, find_foreground
from dataset.intensity import foreground
from dataset.volume_io import read_model_volume, write_atomically

VERSION = 1  # of the format: entries of another one are made again
RECORD_BYTES = 8192  # about the largest JSON


@dataclass(frozen=True)
class CacheEntry:
    """Where a volume is cached.

    source: the volume's `.nii.gz`. array: the `.npy`, with the JSON beside it. dtype: "int16" or "float32".
    """

    source: Path
    array: Path
    dtype: str

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

    def open(self) -> CroppedVolume:
        """The volume, of which only what is asked for is read. UserError if the file is gone."""
        path, dtype = self.entry.array, self.entry.dtype
        try:
            stored = np.memmap(path, STORED[dtype], "r", len(_array_header(self.shape, dtype)), self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cached volume lost during training ({error}): start again") from error
        return CroppedVolume(np.asarray(stored), self.affine, self.foreground)


def write_entry(entry: CacheEntry, intensity_range: tuple[float, float]) -> None:
    """Reads and checks a volume as `read_model_volume` does and caches it. UserError as there, or if it can't write."""
    state = entry.source.stat()  # before reading: a file that changes meanwhile does not agree with it later
    volume = read_model_volume(entry.source, intensity_range)
    stored = encode(volume.data[0].numpy(), entry.dtype)  # (D, H, W)
    found = find_foreground(foreground(decode(stored)))
    record = {
        "version": VERSION,
        "source_size": state.st_size,
        "source_mtime_ns": state.st_mtime_ns,
        "shape": stored.shape,
        "affine": volume.affine.tolist(),
        "first": found.first.tolist(),
        "last": found.last.tolist(),
        "voxels": found.voxels.tolist(),
    }
    entry.record.unlink(missing_ok=True)  # else it could come to vouch for other voxels
    write_atomically(entry.array, _array_header(stored.shape, entry.dtype), stored.data)
    write_atomically(entry.record, json.dumps(record, separators=(",", ":")).encode())


def read_entry(entry: CacheEntry) -> CachedVolume | None:
    """A sound entry of the volume's present file, or None."""
    try:
        state = entry.source.stat()
        record = json.loads(entry.record.read_bytes())
        shape = tuple(record["shape"])
        found = (record["version"], record["source_size"], record["source_mtime_ns"], entry.array.stat().st_size)
        if found != (VERSION, state.st_size, state.st_mtime_ns, array_bytes(shape, entry.dtype)):
            return None
        area = Foreground(*(np.array(record[name], dtype=np.int32) for name in ("first", "last", "voxels")))
        return CachedVolume(entry, shape, np.array(record["affine"], dtype=np.float64), area)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def array_bytes(shape: tuple[int, int, int], dtype: str) -> int:
    """Size of the `.npy` of a volume (D, H, W)."""
    return len(_array_header(shape, dtype)) + prod(shape) * STORED[dtype].itemsize


def _array_header(shape: tuple[int, int, int], dtype: str) -> bytes:
    stream = io.BytesIO()
    description = {"descr": STORED[dtype].str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()
