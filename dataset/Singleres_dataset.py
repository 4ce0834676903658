"""Data of the latent diffusion model at one resolution: latents with their class, or the volumes to make them from."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError
from common.progress import tracked
from dataset.cache.latents import LatentCache
from dataset.checking.before_training import check_volumes
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.data_split import TRAINING, DataSplit
from dataset.order.epochs import SampleKey
from dataset.volumes.geometry import size_text
from dataset.volumes.index import latent_path
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range
from dataset.volumes.volume_io import read_header, read_model_volume

logger = logging.getLogger(__name__)


class Singleres_dataset(Multires_dataset):
    """Latents of all classes in one size, or with `generate_latents` the volumes that latents are made from.

    Arguments:
        root_dir: JSON, class id "0", "1", ... -> folder or list of folders. For latents they are the folders of the
            latents (`X_latents`), for `generate_latents` those of the volumes (`X`).
        resolution: latent grid (z, x, y) that every latent must have.
        generate_latents: see Items.
        intensity_range: lowest and highest intensity of volume files.
        check: reads a few volume files whole at once (`check_sample`); a program of several processes can leave it to
            one.
        vq_size, split, cache, side: as of `Multires_dataset`.

    Items:
        latents: as of `Multires_dataset`.
        generate_latents: (volume (1, D, H, W) float32 in [-1, 1], path str).

    Attributes: as of `Multires_dataset`; shapes are (D, H, W) of volumes. With generate_latents also `headers` of the
    volumes and `latent_paths`, where each latent belongs.

    Raises:
        UserError: a JSON or folder that does not fit, latents of another size than `resolution` or of several channel
            counts, volumes in place of latents, unreadable files. Headers are checked at once, and of volumes what
            `check_sample` finds.
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
        side: str = TRAINING,
    ):
        assert not (generate_latents and cache), "the cache is for latents"
        self.resolution = tuple(int(extent) for extent in resolution)
        if len(self.resolution) != 3 or min(self.resolution) < 1:
            raise UserError(f"resolution {list(resolution)}: three positive numbers are needed, the latent grid z x y")
        self.generate_latents = generate_latents
        self.intensity_range = check_intensity_range(intensity_range)
        if not generate_latents:
            super().__init__(root_dir, vq_size=vq_size, split=split, cache=cache, side=side)
            return
        self._list_files(root_dir, split, side)
        self.latent_paths = [latent_path(path, self.class_folders[path]) for path in self.files]
        self.headers = [read_header(path) for path in tracked(self.files, "reading headers", "file", transient=True)]
        self.shapes = [header.tensor_shape for header in self.headers]
        if check:
            self.check_sample()

    def __getitem__(self, key: int | SampleKey) -> tuple[torch.Tensor, ...] | tuple[torch.Tensor, str]:
        if not self.generate_latents:
            return super().__getitem__(key)
        path = self.files[key[1] if isinstance(key, tuple) else key]
        return read_model_volume(path, self.intensity_range).data, str(path)

    def check_sample(self, log: logging.Logger = logger) -> None:
        """Reads a few volumes whole and looks at all headers.

        UserError: see `check_volumes`, e.g. files of [0, 1] that are declared as [-1, 1].
        """
        check_volumes(self.root_dir, self.files_by_label(), self.headers, self.intensity_range, log)

    def _check_grid(self, path: Path, channels: int, grid: Grid) -> None:
        super()._check_grid(path, channels, grid)
        if grid == self.resolution:
            return
        if len(self.buckets) > 1:
            raise UserError(
                f"{path}: a latent of size {size_text(grid)}, but one size is needed, {size_text(self.resolution)}: "
                f"{self.root_dir} has latents of {', '.join(map(size_text, sorted(self.buckets)))}: train on one size, "
                "with a JSON of its folders alone, or on all with train/train_BiFlowNet_MultiRes.py"
            )
        raise UserError(
            f"{path}: a latent of size {size_text(grid)}, but {size_text(self.resolution)} is needed: "
            f"give --resolution {' '.join(map(str, grid))}"
        )
