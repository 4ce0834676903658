"""Pairs of two contrasts: the other one of the same study, brought onto the grid of each volume."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torchio as tio

from common.errors import UserError
from dataset.order.split import find_subject
from dataset.volumes.index import list_volumes
from dataset.volumes.volume_io import Volume, read_model_volume, tensor_to_nifti

LEAST_COVERED = 0.5  # share of what is seen in a volume that the other one has to show too


def pair_up(images: Mapping[Path, Path], others: Sequence[str], pattern: str | None) -> dict[Path, Path]:
    """Of each of `images` (file -> its folder) that has one the volume in the folders `others` of the same study.

    pattern: finds the study in a path below its folder, as `find_subject` takes it.
    UserError: no folders or pattern, a folder without volumes, a path without study, two volumes of one study among the
    others, no pair at all.
    """
    if not others or pattern is None:
        raise UserError(
            "operator contrast needs others (folders of volumes) and pattern (what names a study in a path)"
        )
    study_of = find_subject(pattern, "pattern", "study")
    by_study: dict[str, Path] = {}
    for folder in map(Path, others):
        for path in list_volumes(folder):
            study = study_of(path, path.relative_to(folder).as_posix())
            if (twin := by_study.setdefault(study, path)) != path:
                raise UserError(f"{path}: of the study {study} like {twin}: give a pattern that tells them apart")
    studies = {path: study_of(path, path.relative_to(folder).as_posix()) for path, folder in images.items()}
    pairs = {path: by_study[study] for path, study in studies.items() if study in by_study}
    if not pairs:
        raise UserError(
            f"others: no study of {', '.join(others)} (e.g. {next(iter(by_study))}) is one of the volumes (e.g. "
            f"{next(iter(studies.values()))}): is the pattern {pattern!r} right?"
        )
    return pairs


def onto_grid_of(image: Path, other: Path) -> tuple[np.ndarray, Volume]:
    """The other's values (X, Y, Z) on the grid of the image, air where it has none; and the image.

    UserError: the two show different places of the body: other scanner coordinates, or not of one study.
    """
    fixed, moving = read_model_volume(image, (-1, 1)), read_model_volume(other, (-1, 1))
    seen, values = _unit_range(fixed), _unit_range(moving)
    # Beside the values a channel of ones: what lies outside is 0 in both, which is air and tells how much is covered.
    both = tio.ScalarImage(tensor=torch.stack([values, torch.ones_like(values)]), affine=moving.affine)
    grid = tio.Resample((tuple(seen.shape), fixed.affine), image_interpolation="linear", antialias=True)
    values, covered = grid(both).data.clamp(0, 1)
    share = float(covered[seen > seen.mean()].mean())
    if share < LEAST_COVERED:
        raise UserError(
            f"{other}: covers {share:.0%} of what is seen in {image}: their coordinates are not those of one study; "
            "register them first, or give another pattern"
        )
    return (values * 2 - 1).numpy(), fixed


def _unit_range(volume: Volume) -> torch.Tensor:
    """(X, Y, Z), air at 0."""
    return tensor_to_nifti((volume.data[0] + 1) / 2).contiguous()
