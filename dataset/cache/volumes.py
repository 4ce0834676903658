"""Uncompressed copies of files, made once: of volumes, of which a patch is read without the rest, and of latents.

    X_cache/.lock                            held while a process adds to the cache
    X_cache/int16_-1.0_1.0/a/b.npy, b.json   the volume X/a/b.nii.gz, for these settings (`dataset/cache/entry.py`)
    X_latents_cache/float32/a/b.npy, b.json  the latent X_latents/a/b.nii.gz (`dataset/cache/latents.py`)

Training runs share them, those of volumes both stages of the autoencoder. The whole folder may be deleted at any time
when no training runs.
"""

import errno
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import LOCK_NAME, lock, remove_leftovers
from common.parallel import map_in_processes
from common.progress import tracked
from dataset.cache.crops import STORED, CroppedVolume
from dataset.cache.entry import CachedVolume, CacheEntry, entry_bytes, read_entry, read_volume_for_cache, write_entry
from dataset.volumes.index import VOLUME_SUFFIX, cache_folder, cache_path
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.volume_io import read_header

logger = logging.getLogger(__name__)

GB = 10**9
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileCache:
    """The cache of a data set's files; what they are is up to `VolumeCache` and `LatentCache`.

    Arguments:
        dtype: of what is stored, one of `dtypes`.
        settings: name of the folder of entries that are made like these; it begins with the dtype.
        cache_dir: folder for the caches of all class folders; None puts `X_cache` beside each class folder `X`.
        limit_gb: largest size of the cache of one data set in 10^9 bytes; None: what the disk holds.
        read: what `write_entry` reads a file with, in another process.
        of_record: (entry, its record) -> what is remembered of a sound entry; it has a `shape`. ValueError, KeyError,
            TypeError: a strange record.
        shape_of: the shape of a file's entry, by its header.

    Call `build` once for the files, then read them in any process.
    """

    noun: str  # what a file is, for messages
    options: str  # what the names of the cache's options begin with
    dtypes: tuple[str, ...]

    def __init__(
        self,
        dtype: str,
        settings: str,
        cache_dir: str | Path | None,
        limit_gb: float | None,
        read: Callable[[Path], tuple[np.ndarray, dict[str, Any]]],
        of_record: Callable[[CacheEntry, dict[str, Any]], Any],
        shape_of: Callable[[Path], tuple[int, ...]],
    ):
        if dtype not in self.dtypes:
            raise UserError(f'{self.options}cache is "{dtype}": choose {" or ".join(self.dtypes)}')
        self.dtype, self.settings = dtype, settings
        self.cache_dir, self.limit_gb = cache_dir, limit_gb
        self.read, self.of_record, self.shape_of = read, of_record, shape_of
        self.cached: dict[Path, Any] = {}  # what `of_record` made of each sound entry

    def build(self, folders: Mapping[Path, Path], num_workers: int = 0, log: logging.Logger = logger) -> None:
        """Caches the files that are not, or that have changed; entries of files that are gone are deleted.

        Processes that call this at the same time build each file once: one builds, the others wait and find it.

        Args:
            folders: each file's class folder.
            num_workers: processes that build; 0 builds in this one.
            log: gets a line on what is built, or waited for.

        Raises:
            UserError: a file that the data set would refuse, too little space by `limit_gb` or on the disk, a folder
                that cannot be written. What is built by then is kept.
        """
        homes = {folder: cache_folder(folder, self.cache_dir) for folder in sorted(set(folders.values()))}
        for folder, home in homes.items():
            _remove_orphans(folder, home)
        missing = self._load(folders)
        if not missing:
            return
        with ExitStack() as locks:
            for home in sorted(set(homes.values())):  # the same order in every process
                if locks.enter_context(_lock(home, self._ways_out, log)):
                    remove_leftovers(home)
                    locks.callback(remove_leftovers, home)  # and after an error
            missing = self._load(folders)  # another process may have built them
            if missing:
                total = self._check_space(missing, folders)
                log.info("cache: building %d of %d %ss, %s", len(missing), len(folders), self.noun, total)
                write = partial(_write, read=self.read, ways_out=self._ways_out)
                for _ in map_in_processes(write, missing, num_workers, "cache", self.noun):
                    pass
                missing = self._load(folders)
        if missing:
            raise UserError(f"{missing[0].source}: the file changed while it was read: start again when it is whole")

    def _find(self, path: Path) -> Any:
        assert path in self.cached, f"{path}: call build before"
        return self.cached[path]

    @property
    def _ways_out(self) -> str:
        has_smaller = self.dtype == "float32" and "int16" in self.dtypes
        smaller = f"{self.options}cache=int16 (half the size), " if has_smaller else ""
        return f"set {self.options}cache_dir to a folder on a larger disk, {smaller}or {self.options}cache=none"

    def _load(self, folders: Mapping[Path, Path]) -> list[CacheEntry]:
        """Takes up the sound entries; returns the others."""
        missing = []
        for path, folder in tracked(folders.items(), "looking into the cache", self.noun, transient=True):
            entry = CacheEntry(path, cache_path(path, folder, self.settings, self.cache_dir), self.dtype)
            found = read_entry(entry, self.of_record)
            if found is None:
                self.cached.pop(path, None)
                missing.append(entry)
            else:
                self.cached[path] = found
        return missing

    def _check_space(self, missing: Sequence[CacheEntry], folders: Mapping[Path, Path]) -> str:
        """UserError where the entries to come exceed the limit or a disk's free space; else size and place in words."""
        there = sum(entry_bytes(found.shape, self.dtype) for path, found in self.cached.items() if path in folders)
        needed: Counter[Path] = Counter()  # by cache folder
        for entry in missing:
            home = cache_folder(folders[entry.source], self.cache_dir)
            needed[home] += entry_bytes(self.shape_of(entry.source), self.dtype)
        total = there + needed.total()
        where = f"{min(needed)}" + (f" and {len(needed) - 1} more folders" if len(needed) > 1 else "")
        if self.limit_gb is not None and total > self.limit_gb * GB:
            raise UserError(
                f"{self.options}cache_limit_gb is {self.limit_gb:g}, but the cache in {where} needs {_gb(total)}: "
                f"raise it, {self._ways_out}"
            )
        disks = {home: home.stat().st_dev for home in needed}
        for home, disk in disks.items():
            size = sum(needed[other] for other in disks if disks[other] == disk)
            free = shutil.disk_usage(home).free
            if size > free:
                raise UserError(
                    f"{home}: the cache needs {_gb(size)} more, but the disk has {_gb(free)} free: {self._ways_out}"
                )
        return f"{_gb(total)} in {where}"


class VolumeCache(FileCache):
    """The cache of volumes in the model's range.

    Arguments:
        dtype: "int16": 2 bytes a voxel, values within 1.6e-5; "float32": 4 bytes a voxel, exact.
        intensity_range: lowest and highest intensity of the files, mapped to [-1, 1] in the cache.
        cache_dir, limit_gb: see `FileCache`.

    `build` refuses what `read_model_volume` refuses.
    """

    noun = "volume"
    options = "dataset."
    dtypes = ("int16", "float32")

    def __init__(
        self,
        dtype: str = "int16",
        intensity_range: Sequence[float] = MODEL_RANGE,
        cache_dir: str | Path | None = None,
        limit_gb: float | None = None,
    ):
        self.intensity_range = low, high = check_intensity_range(intensity_range)
        read = partial(read_volume_for_cache, dtype=dtype, intensity_range=self.intensity_range)
        settings = f"{dtype}_{low!r}_{high!r}"
        super().__init__(dtype, settings, cache_dir, limit_gb, read, CachedVolume.of_record, _volume_shape)

    def open(self, path: Path) -> CroppedVolume:
        """A volume that was given to `build`."""
        return self._find(path).open()


def _volume_shape(path: Path) -> tuple[int, ...]:
    return read_header(path).tensor_shape


def _write(entry: CacheEntry, read: Callable[[Path], tuple[np.ndarray, dict[str, Any]]], ways_out: str) -> None:
    try:
        write_entry(entry, read)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL:
            raise UserError(f"{error}: the disk of the cache is full, what is built is kept: {ways_out}") from error
        raise
    except OSError as error:  # an old entry that cannot be deleted, or a file that is gone since it was listed
        raise UserError(f"{entry.source}: cannot be cached as {entry.array} ({error.strerror or error})") from error


def _remove_orphans(folder: Path, home: Path) -> None:
    """Deletes the entries, of all settings, of files that `folder` no longer has."""
    for settings in (path for dtype in STORED for path in home.glob(f"{dtype}*")):
        for path in settings.rglob("*"):
            source = folder / path.relative_to(settings).with_suffix(VOLUME_SUFFIX)
            if path.suffix in (".npy", ".json") and not source.exists():
                with suppress(OSError):  # a cache that can only be read serves as well
                    path.unlink(missing_ok=True)


@contextmanager
def _lock(home: Path, ways_out: str, log: logging.Logger) -> Iterator[bool]:
    """Holds a cache folder against other processes that build there; waits for one that does.

    Gives False on a file system without locks: at worst a file is cached twice there.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        held = lock(home / LOCK_NAME, lambda: log.info("cache: waiting for another process that builds in %s", home))
    except OSError as error:
        raise UserError(f"{home}: the cache cannot be written ({error.strerror or error}): {ways_out}") from error
    with held or nullcontext():
        yield held is not None


def _gb(size: int) -> str:
    return f"{size / GB:.3g} GB"
