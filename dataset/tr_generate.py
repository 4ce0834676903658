"""Volumes of a plain folder, e.g. to encode or reconstruct them."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dataset.checking.before_training import check_volumes
from dataset.volumes.index import list_volumes
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.volume_io import read_header, read_model_volume, read_volume

logger = logging.getLogger(__name__)


class GenerateTrData_dataset(Dataset):
    """All `*.nii.gz` below a folder, sorted.

    Arguments:
        root_dir: the folder.
        no_norm: True leaves intensities as they are, unchecked; False maps `intensity_range` to [-1, 1].
        intensity_range: lowest and highest intensity of the files.
        check: unless `no_norm`, a few files are read whole at once, to see that they have this range.

    Items: (volume (1, D, H, W) float32, path str). `shapes`: (D, H, W) of each file.
    Raises UserError for unfit files, by name.
    """

    def __init__(
        self,
        root_dir: str | Path,
        no_norm: bool = False,
        *,
        intensity_range: Sequence[float] = MODEL_RANGE,
        check: bool = True,
    ):
        self.no_norm = no_norm
        self.intensity_range = check_intensity_range(intensity_range)
        self.files = list_volumes(root_dir)
        headers = [read_header(path) for path in self.files]
        self.shapes = [header.tensor_shape for header in headers]
        if check and not no_norm:
            check_volumes(root_dir, {Path(root_dir).name: self.files}, headers, self.intensity_range, logger)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.files[index]
        volume = read_volume(path) if self.no_norm else read_model_volume(path, self.intensity_range)
        return volume.data, str(path)
