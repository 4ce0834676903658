"""Small data sets with a cache that tests share, and what lies in its folder."""

import os
import time
from pathlib import Path

import numpy as np
import torch

from dataset.cache.volumes import VolumeCache
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.volume_io import write_volume
from dataset.vqgan import VQGANDataset

AFFINE = affine_from_spacing((1.0, 2.0, 3.0))
SHAPE = (12, 14, 11)
VOXELS = 12 * 14 * 11


def scan(seed: int, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    """A bright block in background, so that many crops are all background."""
    rng = np.random.default_rng(seed)
    volume = np.full(shape, -1, dtype=np.float32)
    volume[3:8, 4:9, 2:7] = rng.uniform(-1, 1, (5, 5, 5))
    return torch.from_numpy(volume)


def make_set(folder: Path) -> Path:
    """Four volumes, one of them in a subfolder, and the JSON."""
    for i, name in enumerate(("0", "1", "deep/2", "3.v1")):
        write_volume(folder / "A" / f"{name}.nii.gz", scan(i), AFFINE)
    (folder / "set.json").write_text('{"A": "A"}')
    return folder / "set.json"


def data_set(root: Path, cache: VolumeCache | None = None, kind: type = VQGANDataset, **options) -> VQGANDataset:
    options = {"augmentation": True, "patch_size": 4, "val_fraction": 0, **options}
    return kind(root, cache=cache, **options)


def built(root: Path, dtype: str = "int16", num_workers: int = 0, kind: type = VQGANDataset, **options) -> VQGANDataset:
    """A data set with its cache. Options of the cache: cache_dir, limit_gb."""
    own = {name: options.pop(name) for name in ("cache_dir", "limit_gb") if name in options}
    cache = VolumeCache(dtype, options.get("intensity_range", (-1, 1)), **own)
    data = data_set(root, cache, kind, **options)
    cache.build(data.class_folders, num_workers)
    return data


def entries(root: Path, dtype: str = "int16") -> Path:
    return root.parent / "A_cache" / f"{dtype}_-1.0_1.0"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def age(folder: Path) -> None:
    """Makes files look an hour old, so that it shows which ones are made anew."""
    for path in folder.rglob("*.*"):
        os.utime(path, (time.time() - 3600,) * 2)


def renewed(folder: Path) -> list[str]:
    return [name for name in names(folder) if time.time() - (folder / name).stat().st_mtime < 1800]
