"""Volumes to look at during the autoencoder's training."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from dataset.volumes.geometry import centred_affine, spacing_of
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import turned_to_ras, write_volume
from train.loop.background import BackgroundWork
from train.loop.deletion import check_not_deleted
from train.loop.previews import attempt

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class VolumeLogger(Callback):
    """Writes input and reconstruction of a batch's first volume: NIfTI, and a PNG of the central slices.

    Both in the order right, front, head by the batch's affine, which undoes the turns of augmentation too.
    Training batches number 1, 2, 4, 8 … and every `every`-th; the first volume of a validation, at most once in `every`
    batches. The picture goes to TensorBoard as well. Rank 0 only. Every module keeps the mode that it had. What goes
    wrong is a warning (`attempt`).

    Args:
        folder: in the run's; gets train/ and val/ with step_0001500_{input,reconstruction}.nii.gz and step_0001500.png.
        every: batches between two logged training volumes.
        work: what the files are written by, beside training; whoever made it waits for its end.
    """

    def __init__(self, folder: Path, every: int, work: BackgroundWork) -> None:
        self.folder, self.every, self._work = folder, every, work
        self._validation_due = 0  # batch from which on a validation is logged

    def is_due(self, batches_done: int) -> bool:
        if batches_done >= self.every:
            return batches_done % self.every == 0
        return batches_done & (batches_done - 1) == 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if self.is_due(trainer.global_step):
            self._write(trainer, pl_module, batch, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and trainer.global_step >= self._validation_due:
            self._validation_due = trainer.global_step + self.every
            self._write(trainer, pl_module, batch, "val")

    def _write(self, trainer: pl.Trainer, pl_module, batch: dict, split: str) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        shown = self._attempt(step, lambda: _volumes(pl_module, batch, split))
        if shown is not None:
            # Outside of `attempt`: it raises what a checkpoint before has met with.
            self._work.submit(self._attempt, step, lambda: self._write_files(trainer, split, step, *shown))

    def _attempt(self, step: int, make: Callable[[], Result]) -> Result | None:
        what, instead = f"logged volume of step {step}", "set model.log_volume_every=0"
        return attempt(make, what, self.folder.parent, logger, instead)

    def _write_files(
        self, trainer: pl.Trainer, split: str, step: int, volumes: dict[str, Tensor], affine: np.ndarray
    ) -> None:
        check_not_deleted(self.folder.parent)
        stem = self.folder / split / f"step_{step:07d}"
        rows = []
        for name, data in volumes.items():
            turned, to_mm = turned_to_ras(data, affine)
            write_volume(stem.with_name(f"{stem.name}_{name}.nii.gz"), turned, to_mm)
            rows.append((name, list(central_slices(turned, spacing_of(to_mm)).values())))
        picture = save_slice_grid(stem.with_suffix(".png"), rows, columns=PLANES)
        for board in trainer.loggers:
            if isinstance(board, pl.loggers.TensorBoardLogger):
                board.experiment.add_image(f"{split}/volume", picture, step, dataformats="HWC")


def _volumes(pl_module, batch: dict, split: str) -> tuple[dict[str, Tensor], np.ndarray]:
    """Input and reconstruction of a batch's first volume, (1, D, H, W) on the CPU by name, and their affine."""
    logged = pl_module.log_volumes({"data": batch["data"][:1]}, split=split)
    volumes = {name.removesuffix("s"): data[0, :1].float().clamp(-1, 1) for name, data in logged.items()}
    volumes = {name: data.to("cpu", copy=True) for name, data in volumes.items()}
    size = batch["data"].shape[-3:]
    affine = batch["affine"][0].double().cpu().numpy() if "affine" in batch else centred_affine([1, 1, 1], size)
    return volumes, affine
