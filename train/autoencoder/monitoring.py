"""What Lightning's training of the autoencoder reports besides its losses."""

import logging
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from AutoEncoder.model.codebook import codebook_usage, perplexity
from common.progress import Progress
from train.loop.early_warnings import CodebookCollapse, DataBound, DiscriminatorWins
from train.loop.meter import LoopMeter
from train.loop.metrics_file import JsonLines


class TrainingMonitor(Callback):
    """Logs losses, speed, waiting for data, memory, learning rate and the codebook's use, and gives early warnings.

    All at every `log_every`-th step as `train/…`; losses are means over all ranks and the steps since the last such
    line, in place of those of one batch that the model logs itself. Training has to run over `meter.timed(loader)`.
    """

    def __init__(self, cfg: DictConfig, logger: logging.Logger) -> None:
        self.meter = LoopMeter()
        self._logger = logger
        self._data_bound = DataBound(
            f"raise model.num_workers (now {cfg.model.num_workers}), keep the volumes in a cache (dataset.cache, now "
            f"{cfg.dataset.cache}), and the cache on a fast disk (dataset.cache_dir)"
        )
        self._collapse = CodebookCollapse()
        self._discriminator_wins = DiscriminatorWins(cfg.model.disc_loss_type)

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        self.meter.restart()
        pl_module.take_means()
        if trainer.is_global_zero:
            self._logger.info("losses in the log have their weights: %s", describe_weights(pl_module.cfg.model))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module, batch, batch_idx: int) -> None:
        # Lightning logs by a count of its own, which is one too many after resuming from a checkpoint that was saved
        # when training had ended: steps would be named wrongly, and logged at others than here.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.meter.count(len(batch["data"]) * trainer.world_size)
        if trainer.global_step % trainer.log_every_n_steps:
            return
        strategy = trainer.strategy
        scalars = self.meter.read(strategy.root_device, lambda values: strategy.reduce(values, reduce_op="max"))
        warnings = [self._data_bound.check(scalars["data_wait"])]

        losses = pl_module.take_means()
        of_all = strategy.reduce(torch.stack(list(losses.values())), reduce_op="mean").tolist()
        losses = dict(zip(losses, of_all, strict=True))

        scalars["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        counts = pl_module.codebook.recent_counts.to("cpu", copy=True)  # since the last logged step, of all ranks
        pl_module.codebook.recent_counts.zero_()
        if counts.any():  # stage 1, once the codebook has started
            scalars |= {"codebook_usage": codebook_usage(counts), "codebook_perplexity": perplexity(counts)}
            warnings.append(self._collapse.check(counts))

        names = ("d_volume_loss", "logits_volume_real", "logits_volume_fake")
        of_discriminator = [losses.get(f"train/{name}") for name in names]
        if None not in of_discriminator:
            warnings.append(self._discriminator_wins.check(*of_discriminator))

        pl_module.log_dict({**losses, **{f"train/{name}": value for name, value in scalars.items()}})
        if trainer.is_global_zero:
            for warning in filter(None, warnings):
                self._logger.warning("step %d: %s", trainer.global_step, warning)


def describe_weights(weights: DictConfig) -> str:
    """What the weighted losses are made of. weights: `model` of the config."""
    parts = {
        "recon_loss": (weights.l1_weight, "l1"),
        "perceptual_loss": (weights.perceptual_weight, "perceptual distance"),
        "aeloss": (weights.volume_gan_weight, "adversarial loss"),
        "gan_feat_loss": (weights.gan_feat_weight, "feature matching"),
        "discloss": (weights.volume_gan_weight, "d_volume_loss"),
    }
    return ", ".join(f"{name} = {weight:g} x {what}" for name, (weight, what) in parts.items())


class StepProgress(Callback):
    """How far training is, in optimiser steps and with the last losses, told at least at each logged step.

    A validation that lasts tells the same of its batches.
    """

    SHOWN = ("train/recon_loss", "train/discloss", "train/perplexity", "val/recon_loss", "val/psnr")

    def __init__(self, label: str) -> None:
        self.label = label
        self._steps: Progress | None = None
        self._validation: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module) -> None:
        total = trainer.max_steps if trainer.max_steps >= 0 else None
        self._steps = Progress(self.label, total, "step", trainer.global_step, show=trainer.is_global_zero)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        is_logged = trainer.global_step % trainer.log_every_n_steps == 0
        note = self._losses(trainer.callback_metrics) if is_logged or self._steps.is_due else ""
        self._steps.reach(trainer.global_step, note, line=is_logged or None)

    def on_validation_start(self, trainer: pl.Trainer, pl_module) -> None:
        options = {"show": trainer.is_global_zero, "transient": True}
        self._validation = Progress("validation", trainer.num_val_batches[0], "volume", **options)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._validation.reach(batch_idx + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module) -> None:
        self._validation.close()

    def teardown(self, trainer: pl.Trainer, pl_module, stage: str) -> None:
        for progress in filter(None, (self._steps, self._validation)):
            progress.close()

    def _losses(self, metrics: dict[str, Tensor]) -> str:
        return ", ".join(f"{name} {metrics[name].item():.4g}" for name in self.SHOWN if name in metrics)


class JsonLinesLogger(Logger):
    """Writes what Lightning logs as JSON lines: one for each logged step, and one for each validation.

    Steps are optimiser steps done, as in the names of checkpoints; Lightning's own are one less. Lines after
    `start_step`, of an interrupted run, are dropped.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        super().__init__()
        self.path = path
        self.start_step = start_step
        self._lines: JsonLines | None = None  # opened late: by the one process that logs, once training goes on

    @property
    def name(self) -> str:
        return "json"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params, *args, **kwargs) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._lines is None:
            self._lines = JsonLines(self.path, self.start_step)
        # seven digits are all that a float32 has
        self._lines.write(step + 1, {name: float(f"{value:.7g}") for name, value in metrics.items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
