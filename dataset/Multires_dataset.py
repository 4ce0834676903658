"""Data of the latent diffusion model at several resolutions: latents of any sizes with their class."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from common.errors import UserError
from common.progress import tracked
from dataset.cache.latents import LatentCache
from dataset.order.data_split import TRAINING, DataSplit
from dataset.order.epochs import SampleKey
from dataset.volumes.geometry import size_text
from dataset.volumes.index import LATENT_SUFFIX, list_volumes, read_class_folders
from dataset.volumes.latent_record import read_latent_record
from dataset.volumes.volume_io import read_latent, read_latent_header

logger = logging.getLogger(__name__)

Grid = tuple[int, int, int]  # (d, h, w) of a latent


class Multires_dataset(Dataset):
    """Latents of all classes, each class in one or several sizes.

    Arguments:
        root_dir: JSON, class id "0", "1", ... -> folder of latents (`X_latents`) or list of folders.
        vq_size: latent grid size that the model is told as 1.
        split: of its subjects only those on `side`; None: all.
        cache: where latents are read from; `build_cache` comes before the first item. None reads and checks the file
            for every item. The items are the same bit for bit.
        side: of the split.

    Items: (latent (C, d, h, w) float32, class id int64, grid / vq_size (3,) float32), and behind them the attributes
    (A,) float32, NaN where one isn't known, if the data set was given some (`attributes`).

    Attributes: `files`, `labels` and `shapes` (C, d, h, w), one entry per item; `class_folders`, the folder of the JSON
    that each file lies in; `attributes` (N, A) or None, to be set.

    Raises:
        UserError: a JSON or folder that does not fit, latents of several channel counts, volumes in place of latents,
            unreadable files. Headers are checked at once.
    """

    def __init__(
        self,
        root_dir: str | Path,
        *,
        vq_size: int = 64,
        split: DataSplit | None = None,
        cache: LatentCache | None = None,
        side: str = TRAINING,
    ):
        self._list_files(root_dir, split, side)
        self.vq_size, self.cache = vq_size, cache
        self.attributes: torch.Tensor | None = None
        files = tracked(self.files, "reading headers", "file", transient=True)
        self.shapes = [read_latent_header(path).latent_shape for path in files]
        self._check_shapes()

    def _list_files(self, root_dir: str | Path, split: DataSplit | None, side: str = TRAINING) -> None:
        self.root_dir, self.split = Path(root_dir), split
        self.folders = read_class_folders(root_dir)
        entries = [
            (path, class_id, folder)
            for class_id, folders in self.folders.items()
            for folder in folders
            for path in (list_volumes(folder) if split is None else split.select(folder, side))
        ]
        self.files = [path for path, _, _ in entries]
        self.labels = [class_id for _, class_id, _ in entries]
        self.class_folders = {path: folder for path, _, folder in entries}
        if split is not None and side == TRAINING:
            self._check_sides(split)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_channels(self) -> int:
        return self.shapes[0][0]

    @cached_property
    def buckets(self) -> dict[Grid, list[int]]:
        """The items of each size, the smallest size first."""
        grids = sorted({shape[1:] for shape in self.shapes}, key=lambda grid: (grid[0] * grid[1] * grid[2], grid))
        return {grid: [index for index, shape in enumerate(self.shapes) if shape[1:] == grid] for grid in grids}

    def extend(self, other: "Multires_dataset") -> None:
        """Put another data set's latents behind one's own. Attributes of both, or of neither, are set."""
        self.files += other.files
        self.labels += other.labels
        self.shapes += other.shapes
        self.class_folders |= other.class_folders
        for class_id, folders in other.folders.items():
            self.folders.setdefault(class_id, []).extend(folders)
        if self.attributes is not None:
            self.attributes = torch.cat([self.attributes, other.attributes])
        for name in ("buckets", "latent_records"):
            self.__dict__.pop(name, None)  # what was found of one's own alone

    def __getitem__(self, key: int | SampleKey) -> tuple[torch.Tensor, ...]:
        index = key[1] if isinstance(key, tuple) else key  # the epoch changes nothing here
        item = self.read_into(index, torch.empty(self.item_shape(index)))
        return item, *(values[0] for values in self.conditions([index]))

    @property
    def num_hint_channels(self) -> int:
        """Channels of hints (`dataset/Control_dataset.py`) behind those of an item's latent."""
        return 0

    def item_shape(self, index: int) -> tuple[int, int, int, int]:
        return self.num_channels + self.num_hint_channels, *self.shapes[index][1:]

    def read_into(self, index: int, item: torch.Tensor) -> torch.Tensor:
        """Fill and return a contiguous tensor of `item_shape` with what an item begins with. Errors as of reading."""
        if self.cache is None:
            return item.copy_(read_latent(self.files[index]))
        return self.cache.read_into(self.files[index], item)

    def build_cache(self, num_workers: int, log: logging.Logger) -> None:
        """Copy into the cache what is not there yet. Errors as of `LatentCache.build`."""
        self.cache.build(self.class_folders, num_workers, log)

    def conditions(self, indices: Sequence[int]) -> list[torch.Tensor]:
        """What the model is told of some items: class ids (B,), grid / vq_size (B, 3), attributes (B, A) if any."""
        labels = torch.tensor([self.labels[index] for index in indices])
        grids = torch.tensor([self.shapes[index][1:] for index in indices], dtype=torch.float32)
        found = [labels, grids / self.vq_size]
        return found if self.attributes is None else [*found, self.attributes[list(indices)]]

    def files_by_label(self) -> dict[int, list[Path]]:
        return {
            label: [f for f, of in zip(self.files, self.labels, strict=True) if of == label] for label in self.folders
        }

    @cached_property
    def latent_records(self) -> Mapping[Path, dict[str, Any] | None]:
        """For each folder the record of the autoencoder that made its latents, None where there is none."""
        return {folder: read_latent_record(folder) for folders in self.folders.values() for folder in folders}

    def _check_shapes(self) -> None:
        first, channels = (self.files[0], self.shapes[0][0]) if self.files else (None, 0)
        for path, (found_channels, *grid) in zip(self.files, self.shapes, strict=True):
            self._check_grid(path, found_channels, tuple(grid))
            if found_channels != channels:
                raise UserError(
                    f"{path}: {found_channels} channels, but {first} has {channels}: all latents must come from one "
                    "autoencoder, make them again with train/generate_training_latent.py"
                )

    def _check_grid(self, path: Path, channels: int, grid: Grid) -> None:
        """UserError for what is no latent, or none of a size that is wanted."""
        record = self.latent_records.get(self.class_folders[path]) or {}
        if channels == 1 and record.get("embedding_dim") != 1:
            raise UserError(
                f"{path}: a volume of size {size_text(grid)}, not a latent: name the folder that "
                f"train/generate_training_latent.py wrote, {path.parent.name}{LATENT_SUFFIX}, in {self.root_dir}"
            )

    def _check_sides(self, split: DataSplit) -> None:
        """UserError where nobody is left to train on; a warning for classes of which nobody is."""
        missing = ", ".join(map(str, sorted(set(self.folders) - set(self.labels))))
        if not self.files:
            raise UserError(f"{split.path}: no subject of {self.root_dir} is on the side {TRAINING}: draw other shares")
        if missing:
            logger.warning("%s: no subject of class %s is on the side %s: not trained", split.path, missing, TRAINING)
