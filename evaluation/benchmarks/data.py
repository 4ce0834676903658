"""Stage-1 patches a second through a DataLoader: from the cache, and from a whole .nii.gz read for each patch.

Compared first: items from the float32 cache equal the uncached ones bit for bit, those of the int16 cache within 2e-5.
Then each way starts its processes, gives a batch from each, and the time of the batches after these counts.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from config.errors import UserError
from dataset.cache import VolumeCache
from dataset.phantoms import write_phantoms
from dataset.sampling import SampleKey, sample_generator
from dataset.vqgan import VQGANDataset
from evaluation.benchmarks.measuring import Report, Row, in_turn

INT16_TOLERANCE = 2e-5
PARITY_EPOCHS = 2


@dataclass(frozen=True)
class Scale:
    """Volumes of `volume`³, patches of `patch`³; batches timed for each process, from the cache and plain."""

    volume: int
    patch: int
    batch_size: int
    cached_batches: int
    plain_batches: int


SCALES = {"paper": Scale(256, 64, 24, 60, 1), "tiny": Scale(64, 16, 4, 4, 2)}
NUM_PER_CLASS = 2  # phantoms of each of the two classes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this part."""
    parser.add_argument("--num-workers", type=int, default=2, help="loading processes (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the phantoms lie or are made; default: a temporary folder")


def measure(options: argparse.Namespace) -> Report:
    """Make phantoms and caches, compare, then time. UserError if the ways differ or `--num-workers` is below 1."""
    if options.num_workers < 1:
        raise UserError(f"--num-workers {options.num_workers}: at least 1 is needed")
    scale = SCALES[options.size]
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as temporary:
        folder = Path(temporary) if options.folder is None else options.folder
        write_phantoms(folder, NUM_PER_CLASS, 0, scale.volume, seed=0)
        root = folder / "PatchVolume_data.json"
        uncached = _patches(root, scale, None)
        caches, notes = _build(uncached, Path(temporary) / "cache", options.num_workers)
        cached = {dtype: _patches(root, scale, cache) for dtype, cache in caches.items()}
        notes["largest_difference"] = _compare(uncached, cached)

        sets: dict[str, Dataset] = {f"cache {dtype}": data for dtype, data in cached.items()}
        sets["plain"] = PlainPatches(uncached.files, scale.patch)
        batches = {name: scale.plain_batches if name == "plain" else scale.cached_batches for name in sets}
        time_set = partial(_time, scale=scale, num_workers=options.num_workers)
        ways = {name: partial(time_set, data, batches=batches[name]) for name, data in sets.items()}
        seconds = in_turn(ways, options.repetitions)
    counts = {name: count * options.num_workers * scale.batch_size for name, count in batches.items()}
    rows = [Row(name, seconds[name], counts[name]) for name in sets]
    title = f"{scale.patch}³ patches of {scale.volume}³ volumes, {options.num_workers} loading processes"
    return Report(title, "patches", "plain", rows, notes)


class PlainPatches(Dataset):
    """The straightforward way, without the checks of `VQGANDataset`: read the file, cut a patch, flip it."""

    def __init__(self, files: list[Path], patch_size: int):
        self.files = files
        self.patch_size = patch_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        rng = sample_generator(0, *key)
        array = nib.load(self.files[key.index]).get_fdata(dtype=np.float32)
        array = np.moveaxis(array, -1, 0)  # (D, H, W)
        d, h, w = (rng.integers(extent - self.patch_size + 1) for extent in array.shape)
        patch = array[d : d + self.patch_size, h : h + self.patch_size, w : w + self.patch_size]
        flips = [axis for axis in (1, 2) if rng.random() < 0.5]
        return {"data": torch.from_numpy(np.flip(patch, flips).copy())[None]}


def _patches(root: Path, scale: Scale, cache: VolumeCache | None) -> VQGANDataset:
    return VQGANDataset(root, True, "train", 1, scale.patch, val_fraction=0, cache=cache)


def _build(data: VQGANDataset, folder: Path, num_workers: int) -> tuple[dict[str, VolumeCache], dict[str, Any]]:
    """The caches, and how long each took and how large it is."""
    caches, seconds, megabytes = {}, {}, {}
    for dtype in ("int16", "float32"):
        caches[dtype] = VolumeCache(dtype, cache_dir=folder / dtype)
        begin = time.perf_counter()
        caches[dtype].build(data.class_folders, num_workers)
        seconds[dtype] = time.perf_counter() - begin
        megabytes[dtype] = sum(path.stat().st_size for path in (folder / dtype).rglob("*.*")) / 1e6
    sources = sum(path.stat().st_size for path in data.files) / 1e6
    notes = {"build_seconds": seconds, "cache_megabytes": megabytes, "source_megabytes": sources}
    return caches, {"volumes": len(data), **notes}


def _compare(uncached: VQGANDataset, cached: dict[str, VQGANDataset]) -> dict[str, float]:
    """Largest difference of items of each cache from uncached ones. UserError where it is too large."""
    largest = dict.fromkeys(cached, 0.0)
    for key in (SampleKey(epoch, index) for epoch in range(PARITY_EPOCHS) for index in range(len(uncached))):
        expected = uncached[key]["data"]
        for dtype, data in cached.items():
            difference = float((data[key]["data"] - expected).abs().max())
            largest[dtype] = max(largest[dtype], difference)
    if largest["float32"] > 0 or largest["int16"] > INT16_TOLERANCE:
        raise UserError(f"items from the cache differ from uncached ones by up to {largest}: nothing was timed")
    return largest


def _time(data: Dataset, scale: Scale, num_workers: int, batches: int) -> float:
    """Seconds of `batches` batches from each process, after the first of each."""
    keys = [SampleKey(i // len(data), i % len(data)) for i in range((1 + batches) * num_workers * scale.batch_size)]
    loader = DataLoader(data, scale.batch_size, sampler=keys, num_workers=num_workers, generator=torch.Generator())
    passed = iter(loader)
    for _ in range(num_workers):
        next(passed)
    begin = time.perf_counter()
    for _ in range(batches * num_workers):
        next(passed)
    return time.perf_counter() - begin
