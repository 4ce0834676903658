"""Data of the latent diffusion model at one resolution: latents with their class, or the volumes to make them from."""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from common.errors import UserError
from common.progress import tracked
from dataset.cache.latents import LatentCache
from dataset.checking.before_training import check_volumes
from dataset.order.data_split import TRAINING, DataSplit
from dataset.order.epochs import SampleKey
from dataset.volumes.geometry import size_text
from dataset.volumes.index import LATENT_SUFFIX, latent_path, list_volumes, read_class_folders
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.latent_record import read_latent_record
from dataset.volumes.volume_io import read_header, read_latent, read_latent_header, read_model_volume

logger = logging.getLogger(__name__)


class Singleres_dataset(Dataset):
    """Latents of all classes, or with `generate_latents` the volumes that latents are made from.

    Arguments:
        root_dir: JSON, class id "0", "1", ... -> folder or list of folders. For latents they are the folders of the
            latents (`X_latents`), for `generate_latents` those of the volumes (`X`).
        resolution: latent grid (z, x, y) that every latent must have.
        generate_latents: see Items.
        intensity_range: lowest and highest intensity of volume files.
        check: reads a few volume files whole at once (`check_sample`); a program of several processes can leave it to
            one.
        vq_size: latent grid size that the model is told as 1.
        split: of its subjects only those on the training side; None: all.
        cache: where latents are read from; its `build(data.class_folders)` comes before the first item. None reads and
            checks the file for every item. The items are the same bit for bit.

    Items:
        latents: (latent (C, d, h, w) float32, class id int64, resolution / vq_size (3,) float32).
        generate_latents: (volume (1, D, H, W) float32 in [-1, 1], path str).

    Attributes: `files`, `labels` and `shapes`, one entry per item; shapes are (C, d, h, w) of latents or (D, H, W) of
    volumes. `class_folders`, the folder of the JSON that each file lies in. With generate_latents also `headers` of the
    volumes and `latent_paths`, where each latent belongs.

    Raises:
        UserError: a JSON or folder that does not fit, latents of several sizes, of another size than `resolution` or of
            several channel counts, volumes in place of latents, unreadable files. Headers are checked at once, and
            of volumes what `check_sample` finds.
    """

    def __init__(
        self,
        root_dir: str | Path,
        resolution: Sequence[int] = (32, 32, 32),
        generate_latents: bool = False,
        *,
        intensity_range: Sequence[float] = MODEL_RANGE,
        check: bool = True,
        vq_size: int = 64,
        split: DataSplit | None = None,
        cache: LatentCache | None = None,
    ):
        assert not (generate_latents and cache), "the cache is for latents"
        self.root_dir = Path(root_dir)
        self.resolution = tuple(int(extent) for extent in resolution)
        if len(self.resolution) != 3 or min(self.resolution) < 1:
            raise UserError(f"resolution {list(resolution)}: three positive numbers are needed, the latent grid z x y")
        self.vq_size, self.generate_latents, self.cache, self.split = vq_size, generate_latents, cache, split
        self.intensity_range = check_intensity_range(intensity_range)
        self.folders = read_class_folders(root_dir)
        entries = [
            (path, class_id, folder)
            for class_id, folders in self.folders.items()
            for folder in folders
            for path in (list_volumes(folder) if split is None else split.select(folder, TRAINING))
        ]
        if split is not None:
            _check_sides(split, root_dir, set(self.folders), {class_id for _, class_id, _ in entries})
        self.files = [path for path, _, _ in entries]
        self.labels = [class_id for _, class_id, _ in entries]
        self.class_folders = {path: folder for path, _, folder in entries}
        files = tracked(self.files, "reading headers", "file", transient=True)
        if generate_latents:
            self.latent_paths = [latent_path(path, folder) for path, _, folder in entries]
            self.headers = [read_header(path) for path in files]
            self.shapes = [header.tensor_shape for header in self.headers]
            if check:
                self.check_sample()
        else:
            self.shapes = [read_latent_header(path).latent_shape for path in files]
            self._check_shapes()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_channels(self) -> int:
        return self.shapes[0][0]

    def __getitem__(self, key: int | SampleKey) -> tuple[torch.Tensor, ...] | tuple[torch.Tensor, str]:
        index = key[1] if isinstance(key, tuple) else key  # the epoch changes nothing here
        if self.generate_latents:
            return read_model_volume(self.files[index], self.intensity_range).data, str(self.files[index])
        if self.cache is None:
            latent = read_latent(self.files[index])
        else:
            latent = self.cache.read_into(self.files[index], torch.empty(self.shapes[index]))
        return latent, torch.tensor(self.labels[index]), self.resolution_condition

    @property
    def resolution_condition(self) -> torch.Tensor:
        """What the model is told of the resolution, (3,) float32."""
        return torch.tensor(self.resolution, dtype=torch.float32) / self.vq_size

    def files_by_label(self) -> dict[int, list[Path]]:
        return {
            label: [f for f, of in zip(self.files, self.labels, strict=True) if of == label] for label in self.folders
        }

    def check_sample(self, log: logging.Logger = logger) -> None:
        """Reads a few volumes whole and looks at all headers.

        UserError: see `check_volumes`, e.g. files of [0, 1] that are declared as [-1, 1].
        """
        check_volumes(self.root_dir, self.files_by_label(), self.headers, self.intensity_range, log)

    @cached_property
    def latent_records(self) -> dict[Path, dict[str, Any] | None]:
        """For each folder the record of the autoencoder that made its latents, None where there is none."""
        return {folder: read_latent_record(folder) for folders in self.folders.values() for folder in folders}

    def _check_shapes(self) -> None:
        first, channels = self.files[0], self.shapes[0][0]
        for path, (found_channels, *grid) in zip(self.files, self.shapes, strict=True):
            if tuple(grid) != self.resolution:
                raise UserError(self._size_message(path, found_channels, grid))
            if found_channels != channels:
                raise UserError(
                    f"{path}: {found_channels} channels, but {first} has {channels}: all latents must come from one "
                    "autoencoder, make them again with train/generate_training_latent.py"
                )

    def _size_message(self, path: Path, channels: int, grid: Sequence[int]) -> str:
        if channels == 1:
            return (
                f"{path}: a volume of size {size_text(grid)}, not a latent: name the folder that "
                f"train/generate_training_latent.py wrote, {path.parent.name}{LATENT_SUFFIX}, in {self.root_dir}"
            )
        sizes = sorted({shape[1:] for shape in self.shapes})
        if len(sizes) > 1:
            return (
                f"{path}: a latent of size {size_text(grid)}, but one size is needed, {size_text(self.resolution)}: "
                f"{self.root_dir} has latents of {', '.join(map(size_text, sizes))}: train on one size, with a "
                "JSON of its folders alone"
            )
        return (
            f"{path}: a latent of size {size_text(grid)}, but {size_text(self.resolution)} is needed: "
            f"give --resolution {' '.join(map(str, grid))}"
        )


def _check_sides(split: DataSplit, root_dir: str | Path, classes: set[int], trained: set[int]) -> None:
    """UserError where nobody is left to train on; a warning for classes of which nobody is."""
    missing = ", ".join(map(str, sorted(classes - trained)))
    if not trained:
        raise UserError(f"{split.path}: no subject of {root_dir} is on the side {TRAINING}: draw other shares")
    if missing:
        logger.warning("%s: no subject of class %s is on the side %s: it is not trained", split.path, missing, TRAINING)
