"""Training items a second, as batches that arrive in the training process: from the cache, and from .nii.gz files.

--items patches: stage-1 patches through a DataLoader. Plain: nibabel reads a whole .nii.gz for each patch.
--items latents: latents of BiFlowNet, from the cache through threads of the training process. Uncached: through
processes, with the checks of the data set. Plain: likewise without these checks. The latents are made here: independent
normal values, scaled and cut off at -1 and 1. Like those of an autoencoder that hardly compress, to about nine tenths.

Compared first: items from the float32 cache equal the uncached ones bit for bit, those of the int16 cache within 2e-5.
Then each way starts its processes, gives a batch from each, and the time of the batches after these counts.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from dataset.cache.latents import LatentCache
from dataset.cache.volumes import FileCache, VolumeCache
from dataset.order.epochs import SampleKey, sample_generator
from dataset.preparation.phantoms import only_training, write_phantoms
from dataset.Singleres_dataset import Singleres_dataset
from dataset.volumes.volume_io import write_latent
from dataset.vqgan import VQGANDataset
from evaluation.benchmarks.measuring import Report, Row, in_turn
from train.diffusion.batches import make_loader
from train.loop.signals import close_loader

INT16_TOLERANCE = 2e-5
PARITY_EPOCHS = 2
Batches = list[list[SampleKey]]


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


@dataclass(frozen=True)
class LatentScale:
    """`num` latents of `shape` (C, d, h, w); batches timed for each thread from the cache, each process from files."""

    shape: tuple[int, int, int, int]
    num: int
    batch_size: int
    cached_batches: int
    plain_batches: int


LATENT_SCALES = {"paper": LatentScale((8, 32, 32, 32), 128, 16, 150, 5), "tiny": LatentScale((4, 8, 8, 8), 8, 4, 4, 2)}


def measure(cfg: DictConfig) -> Report:
    """Make files and caches, compare, then time. UserError if the ways differ."""
    with tempfile.TemporaryDirectory(prefix="benchmark_data_") as temporary:
        folder = Path(cfg.folder or temporary)
        measure_items = _measure_patches if cfg["items"] == "patches" else _measure_latents
        return measure_items(cfg, folder, Path(temporary) / "cache")


def _measure_patches(cfg: DictConfig, folder: Path, cache_dir: Path) -> Report:
    scale = SCALES[cfg.size]
    write_phantoms(folder, only_training(NUM_PER_CLASS), scale.volume, seed=0)
    root = folder / "PatchVolume_data.json"
    uncached = _patches(root, scale, None)
    caches = {dtype: VolumeCache(dtype, cache_dir=cache_dir / dtype) for dtype in ("int16", "float32")}
    notes = {"volumes": len(uncached), **_build(caches, uncached, cfg.num_workers)}
    cached = {dtype: _patches(root, scale, cache) for dtype, cache in caches.items()}
    notes["largest_difference"] = _compare(uncached, cached)

    load = partial(_through_processes, num_workers=cfg.num_workers)
    ways = {f"cache {dtype}": (partial(load, data), scale.cached_batches) for dtype, data in cached.items()}
    ways["plain"] = (partial(load, PlainPatches(uncached.files, scale.patch)), scale.plain_batches)
    rows = _time_in_turn(ways, len(uncached), scale.batch_size, cfg)
    title = f"{scale.patch}³ patches of {scale.volume}³ volumes, {cfg.num_workers} loading processes"
    return Report(title, "patches", "plain", rows, notes)


def _measure_latents(cfg: DictConfig, folder: Path, cache_dir: Path) -> Report:
    scale = LATENT_SCALES[cfg.size]
    root = _write_latents(folder, scale)
    grid = scale.shape[1:]
    uncached, cache = Singleres_dataset(root, grid), LatentCache(cache_dir / "float32")
    notes = {"latents": len(uncached), **_build({"float32": cache}, uncached, cfg.num_workers)}
    cached = Singleres_dataset(root, grid, cache=cache)
    _compare_latents(uncached, cached, scale.batch_size)

    load = partial(make_loader, num_workers=cfg.num_workers, pin_memory=False)
    load_plainly = partial(_through_processes, PlainLatents(uncached.files), num_workers=cfg.num_workers)
    ways = {
        "cache float32": (partial(load, cached), scale.cached_batches),
        "uncached": (partial(load, uncached), scale.plain_batches),
        "plain": (load_plainly, scale.plain_batches),
    }
    rows = _time_in_turn(ways, len(uncached), scale.batch_size, cfg)
    size = "x".join(map(str, scale.shape))
    title = f"{size} latents in batches of {scale.batch_size}, {cfg.num_workers} loading processes or threads"
    return Report(title, "latents", "plain", rows, notes)


class PlainLatents(Dataset):
    """The straightforward way, without the checks of `Singleres_dataset`."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: SampleKey) -> torch.Tensor:
        return torch.from_numpy(self._read(key).copy())

    def _read(self, key: SampleKey) -> np.ndarray:
        array = nib.load(self.files[key.index]).get_fdata(dtype=np.float32)
        return np.moveaxis(array, -1, 0)  # (C, d, h, w), or (D, H, W) of a volume


class PlainPatches(PlainLatents):
    """The straightforward way, without the checks of `VQGANDataset`: read the file, cut a patch, flip it."""

    def __init__(self, files: list[Path], patch_size: int):
        super().__init__(files)
        self.patch_size = patch_size

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        rng = sample_generator(0, *key)
        array = self._read(key)
        d, h, w = (rng.integers(extent - self.patch_size + 1) for extent in array.shape)
        patch = array[d : d + self.patch_size, h : h + self.patch_size, w : w + self.patch_size]
        flips = [axis for axis in (1, 2) if rng.random() < 0.5]
        return {"data": torch.from_numpy(np.flip(patch, flips).copy())[None]}


def _write_latents(folder: Path, scale: LatentScale) -> Path:
    """Makes the latents that aren't there; gives their JSON."""
    for index in range(scale.num):
        path = folder / "benchmark_latents" / "x".join(map(str, scale.shape)) / f"{index:03d}.nii.gz"
        if not path.exists():
            values = sample_generator(0, 0, index).standard_normal(scale.shape, dtype=np.float32)
            write_latent(path, (0.3 * values).clip(-1, 1))
    root = path.parent.with_suffix(".json")
    root.write_text(json.dumps({"0": path.parent.name}))
    return root


def _patches(root: Path, scale: Scale, cache: VolumeCache | None) -> VQGANDataset:
    return VQGANDataset(root, True, "train", 1, scale.patch, val_fraction=0, cache=cache)


def _build(caches: dict[str, FileCache], data: VQGANDataset | Singleres_dataset, num_workers: int) -> dict[str, Any]:
    """How long each cache took to build and how large it is."""
    seconds, megabytes = {}, {}
    for dtype, cache in caches.items():
        begin = time.perf_counter()
        cache.build(data.class_folders, num_workers)
        seconds[dtype] = time.perf_counter() - begin
        megabytes[dtype] = sum(path.stat().st_size for path in Path(cache.cache_dir).rglob("*.*")) / 1e6
    sources = sum(path.stat().st_size for path in data.files) / 1e6
    return {"build_seconds": seconds, "cache_megabytes": megabytes, "source_megabytes": sources}


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


def _compare_latents(uncached: Singleres_dataset, cached: Singleres_dataset, batch_size: int) -> None:
    """UserError where a batch from the cache isn't made of the uncached items, bit for bit."""
    loader = make_loader(cached, _batches(len(cached) // batch_size, len(cached), batch_size), 1, pin_memory=False)
    for batch in loader:
        for index, *found in zip(*batch, strict=True):
            if not all(map(_same_bits, found, uncached[int(index)])):
                raise UserError(f"{cached.files[index]}: the cached latent differs from the file: nothing was timed")
    close_loader(loader)


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and found.numpy().tobytes() == expected.numpy().tobytes()


def _time_in_turn(
    ways: dict[str, tuple[Callable[[Batches], Iterable], int]], num_items: int, batch_size: int, cfg: DictConfig
) -> list[Row]:
    """ways: each with what makes a loader for given batches, and how many are timed for each process."""
    timed = {
        name: partial(_time, load, _batches((1 + count) * cfg.num_workers, num_items, batch_size), cfg)
        for name, (load, count) in ways.items()
    }
    seconds = in_turn(timed, cfg.repetitions)
    counts = {name: count * cfg.num_workers * batch_size for name, (_, count) in ways.items()}
    return [Row(name, seconds[name], counts[name]) for name in ways]


def _batches(count: int, num_items: int, batch_size: int) -> Batches:
    """One pass without the gaps between epochs."""
    keys = [SampleKey(i // num_items, i % num_items) for i in range(count * batch_size)]
    return [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]


def _time(load: Callable[[Batches], Iterable], batches: Batches, cfg: DictConfig) -> float:
    """Seconds of all batches after the first of each process."""
    loader = load(batches)
    passed = iter(loader)
    for _ in range(cfg.num_workers):
        next(passed)
    begin = time.perf_counter()
    for _ in passed:
        pass
    seconds = time.perf_counter() - begin
    close_loader(loader)
    return seconds


def _through_processes(data: Dataset, batches: Batches, num_workers: int) -> DataLoader:
    return DataLoader(data, batch_sampler=batches, num_workers=num_workers, generator=torch.Generator())
