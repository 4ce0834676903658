"""Volumes of a plain folder, e.g. to encode or reconstruct them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from dataset.volumes.index import list_volumes
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.volume_io import read_header, read_model_volume, read_volume


class GenerateTrData_dataset(Dataset):
    """All `*.nii.gz` below a folder, sorted.

    Arguments:
        root_dir: the folder.
        no_norm: True leaves intensities as they are on disk, False maps `intensity_range` to [-1, 1].
        intensity_range: lowest and highest intensity of the files.

    Items: (volume (1, D, H, W) float32, path str). `shapes`: (D, H, W) of each file.
    Raises UserError for unfit files, by name.
    """

    def __init__(self, root_dir: str | Path, no_norm: bool = False, *, intensity_range: Sequence[float] = MODEL_RANGE):
        self.no_norm = no_norm
        self.intensity_range = check_intensity_range(intensity_range)
        self.files = list_volumes(root_dir)
        self.shapes = [read_header(path).tensor_shape for path in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        path = self.files[index]
        volume = read_volume(path) if self.no_norm else read_model_volume(path, self.intensity_range)
        return volume.data, str(path)
