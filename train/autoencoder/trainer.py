"""The Lightning trainer of the autoencoder: processes, precision, callbacks and what is logged where."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.plugins.environments import TorchElasticEnvironment

from AutoEncoder.model.PatchVolume import AE_finetuning
from common.processes import choose_device, is_launched
from config.schema.option import TENSORBOARD
from train.autoencoder.checkpoint_io import PREFIX, BackgroundCheckpointIO, RandomState
from train.autoencoder.monitoring import JsonLinesLogger, StepProgress, TrainingMonitor
from train.autoencoder.resume import Start
from train.autoencoder.step_watch import StepWatch, StopWhenAsked
from train.autoencoder.strategy import TwoPassDDPStrategy
from train.autoencoder.validation import Validations
from train.callbacks import VolumeLogger
from train.loop.background import BackgroundWork
from train.loop.tracker import Tracker

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
EXPECTED_WARNINGS = (
    "Using ModelCheckpoint with manual optimization",  # checkpoints hold the state after the step
    ".*module\\(s\\) in eval mode at the start of training",  # stage 2's frozen parts
    ".*does not have many workers",
    ".*The number of training batches .* is smaller than the logging interval",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    "Grad strides do not match bucket view strides",  # of 1³ kernels, whose memory is the same in both layouts
    "You.re resuming from a checkpoint that ended before the epoch ended",  # EpochBatches knows the place
)


def build_trainer(
    cfg: DictConfig,
    root: Path,
    start: Start,
    monitor: TrainingMonitor,
    validations: Validations,
    work: BackgroundWork,
) -> pl.Trainer:
    """The trainer of the run in `root`, which goes on from `start`; `work` writes checkpoints and previews."""
    devices, num_nodes, world_size = cfg.model.gpus, 1, cfg.model.gpus  # Lightning starts the processes
    plugins = [BackgroundCheckpointIO(work, cfg.model.keep_checkpoints, start.content)]
    if is_launched():
        # To Lightning each process is a node with one device, so that it may be the only one that the process sees.
        device = own_device(cfg)
        devices = 1 if device.type == "cpu" else [device.index]
        num_nodes = world_size = int(os.environ["WORLD_SIZE"])
        plugins.append(TorchElasticEnvironment())  # also under Slurm, whose numbers are others
    with quiet_lightning():
        return pl.Trainer(
            accelerator=cfg.model.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=TwoPassDDPStrategy() if world_size > 1 else "auto",
            precision=PRECISIONS[str(cfg.model.precision)],
            max_epochs=-1,  # training counts in steps alone
            check_val_every_n_epoch=None,  # when, `validations` says
            val_check_interval=1,
            num_sanity_val_steps=0,
            log_every_n_steps=cfg.model.log_every,
            logger=_loggers(cfg, root, start),
            callbacks=_callbacks(cfg, root, monitor, validations, work),
            plugins=plugins,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )


def _loggers(cfg: DictConfig, root: Path, start: Start) -> list[Logger]:
    loggers = [
        JsonLinesLogger(root / "metrics.jsonl", start.step),  # first: it notices that the folder is gone
        TensorBoardLogger(root, name="", version="logs", purge_step=start.step or None),
    ]
    if cfg.model.logger != TENSORBOARD:
        loggers.append(Tracker(cfg.model.logger, root, OmegaConf.to_container(cfg)))
    return loggers


def _callbacks(
    cfg: DictConfig, root: Path, monitor: TrainingMonitor, validations: Validations, work: BackgroundWork
) -> list[Callback]:
    checkpoints = root / "checkpoints"
    best = dict(filename="best-{step:07d}-{val/recon_loss:.4f}", monitor="val/recon_loss", save_top_k=3)
    # The file of a step replaces one of a run that went on from an earlier step; which go, BackgroundCheckpointIO says.
    regular = dict(filename=PREFIX + "{step:07d}", every_n_train_steps=cfg.model.checkpoint_every, save_top_k=-1)
    regular["enable_version_counter"] = False
    watch = StepWatch(checkpoints / "last.ckpt", work)
    callbacks = [
        *(ModelCheckpoint(checkpoints, auto_insert_metric_name=False, **options) for options in (best, regular)),
        watch,
        RandomState(),
        validations,
        monitor,  # before what shows its means
        StepProgress(f"stage {cfg.model.stage}"),
    ]
    if cfg.model.log_volume_every > 0:
        callbacks.append(VolumeLogger(root / "volumes", cfg.model.log_volume_every, work))
    if cfg.model.stage == 2:
        callbacks.append(AE_finetuning())
    return [*callbacks, StopWhenAsked(watch)]


def own_device(cfg: DictConfig) -> torch.device:
    """The device of this process; UserError: it has none."""
    device = "cuda" if cfg.model.accelerator == "gpu" else cfg.model.accelerator
    return choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning without its tips and without warnings about what is done on purpose here."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        lightning.setLevel(level)
