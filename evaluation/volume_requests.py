"""What to generate: the volumes that a config asks for, their names, and which of them are there already.

OUT/seed_S/NAME_XxYxZ.nii.gz    XxYxZ are the voxels in NIfTI order
OUT/seed_S/NAME_XxYxZ.json      what the volume depends on: class, grid, seed, sampler, checkpoints
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from config.errors import UserError
from dataset.index import read_class_folders
from dataset.intensity import MODEL_RANGE
from dataset.manifest import Intensity, common_intensity
from dataset.volume_io import is_whole_volume, read_header


@dataclass(frozen=True)
class Request:
    """One volume to generate."""

    class_id: int
    class_name: str
    grid: tuple[int, int, int]  # latent grid (d, h, w)
    spacing_mm: tuple[float, float, float]  # (x, y, z)
    sample: int  # number of the volume among those of its class and grid
    path: Path  # where it goes
    voxels: tuple[int, int, int]  # its size (X, Y, Z)
    tile: int | None  # edge in voxels of the tiles it is decoded in; None: in one pass
    intensity: Intensity | None = None  # how -1 and 1 are written; None: as they are

    @property
    def intensity_range(self) -> tuple[float, float]:
        """What -1 and 1 become in the file."""
        return MODEL_RANGE if self.intensity is None else (self.intensity.low, self.intensity.high)

    def record(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The content of the JSON beside the volume, in which `settings` are what the whole run has in common."""
        record = {**asdict(self), **settings}
        del record["path"]
        return json.loads(json.dumps(record))  # tuples become lists, as in a record that is read back


def list_requests(cfg: DictConfig) -> list[Request]:
    """All volumes of the class table, `num_samples` of each class and grid.

    Raises UserError for an empty table, two volumes under one name, or classes whose units `denormalize` doesn't tell.
    """
    requests = []
    intensities = class_intensities(cfg)
    for row in cfg.classes:
        for grid, spacing in zip(row.grids, row.spacings_mm, strict=True):
            h, w, d = (grid[axis] * cfg.downsample for axis in (1, 2, 0))  # X, Y, Z
            tile = None if math.prod(grid) <= cfg.max_single_pass**3 else cfg.tile
            for sample in range(cfg.num_samples):
                number = f"_{sample}" if cfg.num_samples > 1 else ""
                path = seed_folder(cfg) / f"{row.name}_{h}x{w}x{d}{number}.nii.gz"
                spacing_mm = tuple(float(length) for length in spacing)
                requests.append(
                    Request(
                        row.id, row.name, tuple(grid), spacing_mm, sample, path, (h, w, d), tile, intensities[row.id]
                    )
                )
    if not requests:
        raise UserError("classes is empty: name in the config what to generate, as config/generation_8x.yaml does")
    paths = [request.path for request in requests]
    if len(set(paths)) < len(paths):
        repeated = next(path for path in paths if paths.count(path) > 1)
        raise UserError(
            f"classes: two entries would both write {repeated}: give classes different names and grids different sizes"
        )
    return requests


def class_intensities(cfg: DictConfig) -> dict[int, Intensity | None]:
    """For each class id of the table the units of its data, from the manifests of its folders; None without."""
    ids = [row.id for row in cfg.classes]
    if cfg.denormalize is None:
        return dict.fromkeys(ids)
    folders = read_class_folders(cfg.denormalize)
    for class_id in ids:
        if class_id not in folders:
            raise UserError(f"denormalize: {cfg.denormalize} has no class {class_id}: name its folder there")
    return {class_id: common_intensity(folders[class_id]) for class_id in ids}


def seed_folder(cfg: DictConfig) -> Path:
    """OUT/seed_S, the folder of all volumes of a run."""
    return Path(cfg.output_dir) / f"seed_{cfg.seed}"


def record_path(volume: Path) -> Path:
    """The JSON beside a volume."""
    return volume.with_name(volume.name.removesuffix(".nii.gz") + ".json")


def is_done(request: Request, settings: dict[str, Any]) -> bool:
    """Whether the volume is there, whole and made by the same settings.

    Raises UserError for a whole volume that was made by other settings, or by unknown ones.
    """
    if not is_whole_volume(request.path) or read_header(request.path).shape != request.voxels:
        return False
    record = request.record(settings)
    try:
        found = json.loads(record_path(request.path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{request.path}: how this volume was made is not known, {record_path(request.path).name} is not there: "
            "remove the volume, or choose another output_dir"
        )
    different = [key for key in record.keys() | found.keys() if found.get(key) != record.get(key)]
    if different:
        key = min(different)
        raise UserError(
            f"{request.path}: this volume was made with other settings ({', '.join(sorted(different))}: {key} was "
            f"{found.get(key)}, is {record.get(key)}): choose another output_dir or seed, or remove the volume"
        )
    return True


def batches_of_one_grid(requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Batches of at most `batch_size` volumes, each of one latent grid; classes may be mixed."""
    by_grid: dict[tuple[int, int, int], list[Request]] = {}
    for request in requests:
        by_grid.setdefault(request.grid, []).append(request)
    return [same[i : i + batch_size] for same in by_grid.values() for i in range(0, len(same), batch_size)]


def noise_generator(seed: int, request: Request) -> torch.Generator:
    """The source of all noise of one volume, on the CPU so that it is the same on every device."""
    entropy = (seed, request.class_id, *request.grid, request.sample)
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
