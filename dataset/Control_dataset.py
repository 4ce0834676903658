"""Data of a ControlNet: latents with their class and, on the same grid, hints."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from logging import Logger
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.places import is_file
from dataset.cache.latents import LatentCache
from dataset.hints import Grid, HintReader
from dataset.Multires_dataset import Multires_dataset
from dataset.order.data_split import TRAINING, DataSplit
from dataset.volumes.index import LATENT_SUFFIX, VOLUME_SUFFIX, read_hint_folders
from dataset.volumes.latent_record import read_latent_record
from dataset.volumes.volume_io import read_header

logger = logging.getLogger(__name__)

SAME_PLACE_MM = 0.01  # corners of two volumes on one grid


class Control_dataset(Multires_dataset):
    """As `Multires_dataset`; an item's latent has the hints' channels behind its own, (C + H, d, h, w).

    root_dir: JSON, class id -> {"images": folder of latents, "hints": {name: folder}}, or lists of one order. A hint
    has the name of its latent's file. hints: what they are, in the order of their channels.

    Raises:
        UserError: as there; a hint that is missing, or on another grid than its latent, or elsewhere in the patient.
    """

    def __init__(self, root_dir: str | Path, *, hints: Sequence[HintReader], **options: Any) -> None:
        self.hints = list(hints)
        super().__init__(root_dir, **options)
        places = self._hint_places
        self._hint_files: dict[str, list[Path]] = {}
        self._hint_folders: dict[str, dict[Path, Path]] = {}
        for hint in self.hints:
            if missing := [folder for folder, named in places.items() if hint.name not in named]:
                raise UserError(f"{root_dir}: {missing[0]} has no hints {hint.name}: name their folder")
            folders = [places[self.class_folders[path]][hint.name] for path in self.files]
            files = [folder / self._name_below(path) for path, folder in zip(self.files, folders, strict=True)]
            if hint.is_image:
                self._check_autoencoder(hint, {latents: named[hint.name] for latents, named in places.items()})
            self._hint_files[hint.name] = files
            self._hint_folders[hint.name] = dict(zip(files, folders, strict=True))
            self._check(hint, files)
        self._caches = [self._cache_of(hint) for hint in self.hints] if self.cache is not None else []

    def _list_files(self, root_dir: str | Path, split: DataSplit | None, side: str = TRAINING) -> None:
        super()._list_files(root_dir, split, side)
        self._hint_places, pairs_only = read_hint_folders(root_dir)
        kept = []
        for path, label in zip(self.files, self.labels, strict=True):
            folder, names = self.class_folders[path], self._name_below(path)
            if folder not in pairs_only or all(is_file(place / names) for place in self._hint_places[folder].values()):
                kept.append((path, label))
        if self.files and not kept:
            raise UserError(f"{root_dir}: no latent has its hints beside it: encode both, or name the folders of pairs")
        if left := len(self.files) - len(kept):
            logger.info("%s: %d of %d latents have no hint and are left out", root_dir, left, len(self.files))
        self.files, self.labels = [path for path, _ in kept], [label for _, label in kept]

    @property
    def num_hint_channels(self) -> int:
        return sum(hint.channels for hint in self.hints)

    def read_into(self, index: int, item: Tensor) -> Tensor:
        super().read_into(index, item[: self.num_channels])
        first = self.num_channels
        for place, hint in enumerate(self.hints):
            part, path = item[first : first + hint.channels], self._hint_files[hint.name][index]
            if self._caches:
                self._caches[place].read_into(path, part)
            else:
                part.copy_(hint.read(path, self.shapes[index][1:]))
            first += hint.channels
        return item

    def build_cache(self, num_workers: int, logger: Logger) -> None:
        super().build_cache(num_workers, logger)
        for cache, hint in zip(self._caches, self.hints, strict=True):
            cache.build(self._hint_folders[hint.name], num_workers, logger)

    def _name_below(self, path: Path) -> Path:
        return path.relative_to(self.class_folders[path])

    def _cache_of(self, hint: HintReader) -> LatentCache:
        grids = {file: shape[1:] for file, shape in zip(self._hint_files[hint.name], self.shapes, strict=True)}
        read = partial(_read, hint=hint, grids=grids)
        shape_of = {file: (hint.channels, *grid) for file, grid in grids.items()}.__getitem__
        return LatentCache(self.cache.cache_dir, self.cache.limit_gb, hint.settings, read, shape_of)

    def _check_autoencoder(self, hint: HintReader, folders: Mapping[Path, Path]) -> None:
        """By the records of both folders, where they have them. folders: of hints, by those of latents."""
        for latents, folder in folders.items():
            first, second = self.latent_records.get(latents) or {}, read_latent_record(folder) or {}
            made_by = first.get("autoencoder"), second.get("autoencoder")
            if None not in made_by and made_by[0] != made_by[1]:
                raise UserError(
                    f"{folder}: hint {hint.name} is of another autoencoder ({second.get('checkpoint')}) than the "
                    f"latents in {latents} ({first.get('checkpoint')}): encode both with one"
                )

    def _check(self, hint: HintReader, files: Sequence[Path]) -> None:
        missing = [file for file in files if not is_file(file)]
        if missing:
            example = self.files[files.index(missing[0])]
            raise UserError(
                f"{missing[0]}: {len(missing)} of {len(files)} hints {hint.name} are missing, this one of {example}: a "
                "hint has the name of its latent"
            )
        for image, file, shape in zip(self.files, files, self.shapes, strict=True):
            hint.check(file, shape[1:])
            first, second = _volume_of(image), _volume_of(file)
            if first.is_file() and second.is_file():
                check_same_place(first, second)


def _read(source: Path, hint: HintReader, grids: Mapping[Path, Grid]) -> tuple[np.ndarray, dict[str, Any]]:
    return np.ascontiguousarray(hint.read(source, grids[source]).numpy()), {}


def _volume_of(file: Path) -> Path:
    """The volume that a latent is of, beside it in `X` for `X_latents`, or the file itself."""
    for folder in file.parents:
        if folder.name.endswith(LATENT_SUFFIX):
            return folder.with_name(folder.name.removesuffix(LATENT_SUFFIX)) / file.relative_to(folder)
    return file


def check_same_place(image: Path, other: Path) -> None:
    """UserError where two volumes do not have the same voxels in the patient, by their headers."""
    first, second = read_header(image), read_header(other)
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)]) * [*first.shape, 1]
    apart = np.abs((first.affine - second.affine) @ corners.T).max() if first.shape == second.shape else np.inf
    if apart > SAME_PLACE_MM:
        name = other.name.removesuffix(VOLUME_SUFFIX)
        how = "another size" if first.shape != second.shape else f"its corners are up to {apart:.3g} mm away"
        raise UserError(
            f"{other}: not on the grid of {image} ({how}): a hint {name} lies where its volume lies, resample it there"
        )
