"""Lightning callbacks of the autoencoder's training."""

from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch.distributed as torch_distributed
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid
from dataset.volumes.volume_io import write_volume
from train.loop.background import BackgroundWork
from train.loop.rng import random_state, restore_random_state


class VolumeLogger(Callback):
    """Writes input and reconstruction of a batch's first volume: NIfTI, and a PNG of the central slices.

    Training batches number 1, 2, 4, 8 … and every `every`-th; the first volume of a validation, at most once in `every`
    batches. The picture goes to TensorBoard as well. Rank 0 only. Every module keeps the mode that it had.

    Args:
        folder: gets train/ and val/ with step_0001500_{input,reconstruction}.nii.gz and step_0001500.png.
        every: batches between two logged training volumes.
        work: what the files are written by, beside training; whoever made it waits for its end.
    """

    def __init__(self, folder: Path, every: int, work: BackgroundWork) -> None:
        self.folder = folder
        self.every = every
        self._work = work
        self._validation_due = 0  # batch from which on a validation is logged

    def is_due(self, batches_done: int) -> bool:
        """Whether the batch that makes it `batches_done` is logged: powers of two first, then every `every`-th."""
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
        volume = batch["data"][:1]
        reconstruction = pl_module.reconstruct(volume).clamp(-1, 1)
        volumes = {"input": volume[0, :1], "reconstruction": reconstruction[0, :1]}
        volumes = {name: data.float().to("cpu", copy=True) for name, data in volumes.items()}
        affine = batch["affine"][0].cpu().numpy().copy() if "affine" in batch else affine_from_spacing([1, 1, 1])
        self._work.submit(self._write_files, trainer, split, trainer.global_step, volumes, affine)

    def _write_files(
        self, trainer: pl.Trainer, split: str, step: int, volumes: dict[str, Tensor], affine: np.ndarray
    ) -> None:
        stem = self.folder / split / f"step_{step:07d}"
        for name, data in volumes.items():
            write_volume(stem.with_name(f"{stem.name}_{name}.nii.gz"), data, affine)
        rows = [(name, list(central_slices(data).values())) for name, data in volumes.items()]
        picture = save_slice_grid(stem.with_suffix(".png"), rows, columns=PLANES)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_image(f"{split}/volume", picture, step, dataformats="HWC")


class RandomState(Callback):
    """Keeps torch's global generators in the checkpoint: codebook restarts and random slices draw from them.

    Those of all ranks: volumes of several sizes have several numbers of slices, and the ranks' generators drift apart.
    """

    def __init__(self) -> None:
        self._loaded: dict | None = None

    def state_dict(self) -> dict:
        own = random_state()
        if not (torch_distributed.is_available() and torch_distributed.is_initialized()):
            return own
        ranks = [own] * torch_distributed.get_world_size()
        torch_distributed.all_gather_object(ranks, own)  # a checkpoint is made by all ranks at once
        return {**ranks[0], "ranks": ranks}

    def load_state_dict(self, state_dict: dict) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        # as late as possible, since setting up the training draws numbers too
        if self._loaded is not None:
            ranks = self._loaded.get("ranks", [])
            own = ranks[trainer.global_rank] if len(ranks) == trainer.world_size else self._loaded
            restore_random_state(own)
            self._loaded = None


class StepProgress(Callback):
    """One progress bar over all optimiser steps, with the last losses; nothing where there is no terminal."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        total = trainer.max_steps if trainer.max_steps >= 0 else None
        self._bar = tqdm(
            desc=self.label,
            total=total,
            initial=trainer.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if trainer.is_global_zero else True,
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self._bar.update(1)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            shown = ("train/recon_loss", "train/discloss", "train/perplexity", "val/recon_loss")
            metrics = trainer.callback_metrics
            self._bar.set_postfix({name: f"{metrics[name].item():.3f}" for name in shown if name in metrics})

    def teardown(self, trainer: pl.Trainer, pl_module, stage: str) -> None:
        if self._bar is not None:
            self._bar.close()
