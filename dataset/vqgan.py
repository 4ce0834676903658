"""Training and validation data of the Patch-Volume autoencoder (Wang et al., IEEE TMI 2025, section III-A)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.progress import tracked
from dataset.cache.crops import CroppedVolume
from dataset.cache.volumes import VolumeCache
from dataset.checking.before_training import check_volumes
from dataset.order.data_split import sides_of
from dataset.order.epochs import EpochDataset
from dataset.order.random_crops import Turn, centre_crop_start, random_crop
from dataset.order.split import Split, spread_evenly
from dataset.volumes.geometry import crop_affine
from dataset.volumes.index import read_dataset_folders
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.volume_io import read_header, read_model_volume

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CropRule:
    """Volumes of more than `max_voxels` are cropped to `size` = (D, H, W); an axis shorter than that stays whole."""

    max_voxels: int
    size: tuple[int, int, int]

    def crop_size(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if prod(shape) <= self.max_voxels:
            return tuple(shape)
        return tuple(min(extent, length) for extent, length in zip(shape, self.size, strict=True))


class VQGANDataset(EpochDataset):
    """Patches (stage 1) or volumes (stage 2, validation) of all files of a dataset JSON, for compression 8x.

    Arguments:
        root_dir: JSON, name -> folder or list of folders with `*.nii.gz`.
        augmentation: random flips of x and y and quarter turns in their plane, of training items only.
        split: "train" or "val". The same files on every rank and in every run: each class of two or more files has at
            least one in "val". Where no class has two, "val" is "train", with a warning.
        stage: 1 gives training patches, 2 training volumes.
        patch_size: edge of a stage-1 patch in voxels.
        intensity_range: lowest and highest intensity of the files, mapped to [-1, 1].
        val_fraction: share of each class's files in "val"; 0 leaves it empty.
        split_seed: seed of that choice.
        subject_pattern: regular expression that finds a file's subject in its path, so that no subject is on both
            sides (see `dataset/order/split.py`); None: every file is a subject.
        limit: most files in "val", a fixed choice by `split_seed` that is spread over the classes; None: all.
        sides: the split that `val_fraction`, `split_seed` and `subject_pattern` give, where it is known already.
        seed: seed of crops and augmentation.
        background_keep: probability of keeping a stage-1 patch with less than 10 % foreground; 1 keeps all but patches
            of nothing but background, which are never given.
        check: reads a few files whole at once (`check_sample`); a program of several processes can leave it to one.
        affines: training items have an affine too.
        cache: where items are cut from; its `build(data.class_folders)` comes before the first item. None reads and
            checks the whole file for every item. With a float32 cache the items are the same bit for bit.

    Items: "data", float32 in [-1, 1], (1, p, p, p) in stage-1 training, otherwise (1, D, H, W) of the whole volume or
    of a crop where `train_crop` or `val_crop` asks for it (random in training, of the middle in validation). In
    validation, in training with `affines`, "affine" (4, 4) float32 of what is given, turned or not, voxels (x, y, z) to
    mm; in validation also "path" (str).

    Attributes: `files`, `shapes` (D, H, W) of each, `class_folders`, the folder of the JSON that each file lies in.

    Raises:
        UserError: at once for files that are no volumes by their headers, and what `check_sample` finds; on access for
            unreadable voxels, NaN, intensities outside the range, or nothing but background (with `cache`: in
            `build`). The message names the file.
    """

    train_crop = CropRule(256 * 256 * 128, (192, 192, 192))
    val_crop = CropRule(256**3, (256, 256, 256))

    def __init__(
        self,
        root_dir: str | Path,
        augmentation: bool = False,
        split: str = "train",
        stage: int = 1,
        patch_size: int = 64,
        *,
        intensity_range: Sequence[float] = MODEL_RANGE,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        subject_pattern: str | None = None,
        limit: int | None = None,
        sides: Split | None = None,
        seed: int = 0,
        background_keep: float = 1.0,
        check: bool = True,
        affines: bool = False,
        cache: VolumeCache | None = None,
    ):
        super().__init__(seed)
        _check_options(split, stage, patch_size, background_keep)
        self.training = split == "train"
        self.patches = self.training and stage == 1
        self.augmentation = augmentation and self.training
        self.patch_size = patch_size
        self.intensity_range = check_intensity_range(intensity_range)
        self.background_keep = background_keep
        self.affines = affines
        self.cache = cache
        if cache is not None and cache.intensity_range != self.intensity_range:
            raise ValueError(f"intensity_range {self.intensity_range}, but the cache has {cache.intensity_range}")
        self.root_dir = Path(root_dir)
        self.sides = sides or sides_of(root_dir, None, val_fraction, split_seed, subject_pattern)
        self.files = select_files(root_dir, split, val_fraction, self.sides)
        if limit is not None and self.files and not self.training:
            by_name = self.sides.validation if any(self.sides.validation.values()) else self.sides.training
            self.files = spread_evenly(by_name, limit, split_seed)
        folders = [folder for folders in read_dataset_folders(root_dir).values() for folder in folders]
        self.class_folders = {path: next(folder for folder in folders if folder in path.parents) for path in self.files}
        files = tracked(self.files, "reading headers", "file", transient=True)
        self.headers = [read_header(path) for path in files]
        self.shapes = [header.tensor_shape for header in self.headers]  # (D, H, W) of each file
        if self.patches:
            self._warn_of_small_volumes()
        if check:
            self.check_sample()

    def __len__(self) -> int:
        return len(self.files)

    def item_shape(self, index: int) -> tuple[int, int, int]:
        """(D, H, W) of an item: items of equal shape can share a batch."""
        if self.patches:
            return (self.patch_size,) * 3
        return (self.train_crop if self.training else self.val_crop).crop_size(self.shapes[index])

    def check_sample(self, *others: "VQGANDataset", log: logging.Logger = logger) -> None:
        """Reads a few files of both sides whole, and looks at all headers of this one and of `others`.

        UserError: see `check_volumes`, e.g. files of [0, 1] that are declared as [-1, 1].
        """
        sides = (self.sides.training, self.sides.validation)
        files = {name: sorted(path for side in sides for path in side[name]) for name in sides[0]}
        headers = {header.path: header for side in (self, *others) for header in side.headers}
        check_volumes(self.root_dir, files, headers.values(), self.intensity_range, log)

    def _item(self, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor | str]:
        volume, size = self._open(index), self.item_shape(index)
        if self.training:
            start, data = random_crop(volume, size, rng, self.background_keep if self.patches else 1.0)
            turn = Turn.draw(rng) if self.augmentation else Turn()
            item = {"data": turn.apply(data)}
            if self.affines:
                affine = turn.affine(crop_affine(volume.affine, start), size)
                item["affine"] = torch.from_numpy(affine).float()
            return item
        start = centre_crop_start(volume.shape, size)
        affine = torch.from_numpy(crop_affine(volume.affine, start)).float()
        return {"data": volume.crop(start, size), "affine": affine, "path": str(self.files[index])}

    def _open(self, index: int) -> CroppedVolume:
        if self.cache is not None:
            return self.cache.open(self.files[index])
        volume = read_model_volume(self.files[index], self.intensity_range)
        return CroppedVolume(volume.data[0].numpy(), volume.affine)

    def _warn_of_small_volumes(self) -> None:
        small = [path for path, shape in zip(self.files, self.shapes, strict=True) if min(shape) < self.patch_size]
        if small:
            logger.warning(
                f"{len(small)} of {len(self.files)} volumes are smaller than a patch of {self.patch_size} voxels and "
                f"are padded with background, e.g. {small[0]}"
            )


def select_files(root_dir: str | Path, split: str, val_fraction: float, sides: Split) -> list[Path]:
    """The files of one side of the split, over all names of a dataset JSON."""
    training = [path for files in sides.training.values() for path in files]
    validation = [path for files in sides.validation.values() for path in files]
    if sides.source is not None and not training:
        raise UserError(f"{sides.source}: no subject of {root_dir} is on the side training: draw other shares")
    if split == "train":
        return training
    if val_fraction > 0 and not validation and sides.source is None:
        logger.warning("%s: no name has a second subject to validate on: validation uses the training files", root_dir)
        return training
    return validation


def _check_options(split: str, stage: int, patch_size: int, background_keep: float) -> None:
    if split not in ("train", "val"):
        raise UserError(f'split "{split}": choose "train" or "val"')
    if stage not in (1, 2):
        raise UserError(f"model.stage is {stage}: choose 1 (patches) or 2 (volumes)")
    if patch_size < 1:
        raise UserError(f"dataset.patch_size is {patch_size}: a positive number of voxels is needed")
    if not 0 <= background_keep <= 1:
        raise UserError(f"dataset.background_keep is {background_keep}: a probability from 0 to 1 is needed")
