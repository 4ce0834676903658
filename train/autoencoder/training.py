"""Training of the Patch-Volume autoencoder, both stages: `train(cfg, stage)` is what the two scripts call.

Everything of a run lies in `model.default_root_dir`:
    config.yaml     the resolved configuration
    split.json      which files train and which validate
    checkpoints/    step-0003000.ckpt …, the last few; last.ckpt, of the end; best-…, the three best by val/recon_loss
    logs/           TensorBoard; beside it by `model.logger` Weights & Biases or MLflow, whose run logger.json names
    metrics.jsonl   the same numbers, one line of JSON per logged step and per validation
    volumes/        input and reconstruction of the VolumeLogger
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from AutoEncoder.model.PatchVolume import patchvolumeAE
from common.checkpoint_files import copy_checkpoint
from common.compilation import compiling
from common.errors import UserError
from common.files import RUN_LEFTOVERS, check_still_there, lock_folder, remove_leftovers
from common.hub import local_file
from common.log import close_logger, get_logger, process_rank
from common.parallel import check_processes
from common.places import is_file
from common.precision import check_precision, configure_backend
from common.processes import group_left_in_order, is_launched, own_gpu
from config.loading import SAVED_CONFIG, require, save_config
from config.schema.option import TENSORBOARD
from dataset.order.split import Split, keep_split
from train.autoencoder.batches import SPLIT_OPTIONS, EpochBatches, build_datasets, build_loaders, split_files
from train.autoencoder.monitoring import TrainingMonitor
from train.autoencoder.resume import has_begun, load_weights, take_up
from train.autoencoder.step_watch import NotFinite, TrainingStopped
from train.autoencoder.trainer import build_trainer, own_device, quiet_lightning
from train.autoencoder.validation import Validations
from train.loop.background import BackgroundWork
from train.loop.continuing import read_config
from train.loop.deletion import check_not_deleted, deletion_explained
from train.loop.signals import close_loader
from train.loop.tracker import check_installed


def train(cfg: DictConfig, stage: int) -> dict[str, float]:
    """Train one stage and return the last logged metrics.

    Args:
        cfg: AutoencoderConfig (config/base_cfg.yaml).
        stage: the script's stage, which must be that of the config.

    Raises:
        UserError: a mistake in configuration or data, found before training begins, or a loss that is not finite.
        SystemExit: 128 + the signal, after SIGTERM or Ctrl-C and a checkpoint.
    """
    # Check what can be checked at once
    cfg = take_up(cfg)
    _check_options(cfg, stage)
    root, logger = Path(cfg.model.default_root_dir), get_logger(process_rank())

    with ExitStack() as closing:
        closing.enter_context(group_left_in_order())
        closing.callback(close_logger)
        closing.enter_context(own_gpu(own_device(cfg)))

        # Data: headers, and a few files whole
        split = split_files(cfg)
        train_data, val_data = build_datasets(cfg, split, logger)
        logger.info("stage %d: %d training and %d validation files", stage, len(train_data), len(val_data))
        if len(val_data) == cfg.model.val_volumes < sum(map(len, split.validation.values())):
            logger.info("validation takes no more: model.val_volumes is %d", cfg.model.val_volumes)
        if process_rank() == 0:  # where it fails, the launcher ends the others too
            train_data.check_sample(val_data, log=logger)

        # Model; the seed makes all ranks start from the same weights
        pl.seed_everything(cfg.model.seed, verbose=False)
        model = build_autoencoder(cfg)
        start = load_weights(cfg, model, root, logger)
        prepare_for_training(model)

        # Trainer, and the run's folder
        monitor, work = TrainingMonitor(cfg, logger), BackgroundWork()
        validations = Validations(cfg.model.val_every or cfg.model.checkpoint_every, start.validated_at)
        trainer = build_trainer(cfg, root, start, monitor, validations, work)
        configure_backend(trainer.strategy.root_device, cfg.model.arithmetic, fixed_shapes=stage == 1)
        if trainer.is_global_zero:  # an error here ends the other processes too, by the launcher
            closing.enter_context(_run_folder(cfg, root, split))
        closing.enter_context(work)
        train_loader, val_loader = build_loaders(cfg, trainer, train_data, val_data)
        for loader in filter(None, (train_loader, val_loader)):
            closing.callback(close_loader, loader)

        # Resume
        last = root / "checkpoints" / "last.ckpt"
        last_step = _last_step(cfg, len(train_loader))
        trainer.fit_loop.epoch_loop.max_steps = validations.end = last_step
        if start.checkpoint is not None:
            if 0 <= last_step <= start.step:
                if val_loader is None or not validations.is_due(start.step):
                    if trainer.is_global_zero and start.checkpoint != last:  # the last step's news came no further
                        copy_checkpoint(start.checkpoint, last)
                    hint = "raise model.max_steps or max_epochs to go on"
                    logger.info("%s: finished at step %d, %s; %s", root, start.step, last, hint)
                    return {}
                validations.is_all = True
                trainer.fit_loop.epoch_loop.max_steps = start.step + 1  # Lightning would not even start
            logger.info("resuming from %s at step %d", start.checkpoint, start.step)

        # Cache, once for all runs and ranks; with it all files are checked
        if train_data.cache is not None:
            folders = {**train_data.class_folders, **val_data.class_folders}
            train_data.cache.build(folders, cfg.model.num_workers, logger)

        # Train
        with _ends_explained(trainer, train_loader.batch_sampler, logger), quiet_lightning():
            trainer.fit(
                model, monitor.meter.timed(train_loader), val_loader, ckpt_path=start.checkpoint, weights_only=True
            )
        trainer.save_checkpoint(last, weights_only=False)
        work.wait()
        if trainer.is_global_zero:
            check_not_deleted(root, root / SAVED_CONFIG)
            saved = f"training went on with their copies in the cache, and its end is saved in {last}"
            check_still_there([*train_data.files, *val_data.files], "volumes", saved)
        logger.info("finished at step %d: %s", trainer.global_step, last)
        return {name: value.item() for name, value in trainer.callback_metrics.items()}


def _check_options(cfg: DictConfig, stage: int) -> None:
    require(cfg, "dataset.root_dir", "model.default_root_dir")
    if cfg.model.stage != stage:
        raise UserError(f"model.stage is {cfg.model.stage}, but this script trains stage {stage}: use the other script")
    source = cfg.model.resume_from_checkpoint
    is_new = not has_begun(Path(cfg.model.default_root_dir)) and cfg.model.continue_from is None
    if stage == 2 and is_new:
        require(cfg, "model.resume_from_checkpoint")
    if source is not None and is_new and not is_file(local_file(source)):
        raise UserError(f"model.resume_from_checkpoint: {source}: no such checkpoint file")
    if cfg.model.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("model.accelerator is gpu, but no CUDA device was found: set model.accelerator=cpu or auto")
    if cfg.model.logger != TENSORBOARD:
        check_installed(cfg.model.logger)
    device = own_device(cfg)
    check_precision(device, "model.precision", cfg.model.precision)
    if device.type == "cuda" and not is_launched() and cfg.model.gpus > torch.cuda.device_count():
        raise UserError(
            f"model.gpus is {cfg.model.gpus}, but {torch.cuda.device_count()} GPU(s) were found: start as many "
            "processes, or set model.accelerator=cpu"
        )
    if device.type == "cpu" and not is_launched() and not cfg.model.oversubscribe:
        check_processes(cfg.model.gpus, "model.gpus", "set model.oversubscribe=true")
    if cfg.dataset.image_channels != 1:
        raise UserError(f"dataset.image_channels is {cfg.dataset.image_channels}, but volumes are read with 1 channel")


def build_autoencoder(cfg: DictConfig) -> patchvolumeAE:
    """A new autoencoder; what the model refuses in its config becomes a UserError."""
    try:
        return patchvolumeAE(cfg)
    except ValueError as error:
        raise UserError(f"autoencoder config: {error}") from error


def prepare_for_training(model: patchvolumeAE) -> None:
    """Builds the perceptual network, before long work; a weight file that is missing or wrong becomes a UserError."""
    try:
        model.setup("fit")
    except (ValueError, OSError) as error:
        raise UserError(f"{error}; or set model.perceptual_weight=0 to train without it") from error


@contextmanager
def _run_folder(cfg: DictConfig, root: Path, split: Split) -> Iterator[None]:
    """Makes the run's folder, locks it and writes what the run is made with. On rank 0 only."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"model.default_root_dir: {root}: cannot be made ({error.strerror or error})") from error
    with lock_folder(root, "training"):  # before anything of a run that goes on is replaced
        options = {key: cfg.dataset[key] for key in SPLIT_OPTIONS}
        remove_leftovers(root, RUN_LEFTOVERS)
        keep_split(root, cfg.dataset.root_dir, split, options, has_begun(root))
        saved, before = cfg.copy(), (read_config(root) or {}).get("model", {})
        saved.model.set_anew = False
        for key in ("resume_from_checkpoint", "continue_from"):  # where a run began stays what it was
            saved.model[key] = cfg.model[key] or before.get(key)
        save_config(saved, root)
        with deletion_explained(root):
            yield


def _last_step(cfg: DictConfig, steps_per_epoch: int) -> int:
    """The optimiser step that training ends at, by `max_steps` or `max_epochs`, whichever comes first; -1: never."""
    limits = [cfg.model.max_steps, cfg.model.max_epochs * steps_per_epoch]
    return min((limit for limit in limits if limit >= 0), default=-1)


@contextmanager
def _ends_explained(trainer: pl.Trainer, batches: EpochBatches, logger: logging.Logger) -> Iterator[None]:
    """Around the training: what ends it early becomes an exit status or a UserError."""
    try:
        with compiling("model.compile", "set it to false"):
            yield
    except TrainingStopped as stop:
        logger.info("%s at step %d: last.ckpt saved", stop, trainer.global_step)
        raise SystemExit(128 + stop.signal_number) from None
    except NotFinite as error:
        raise UserError(_describe(error, trainer, batches)) from error


def _describe(error: NotFinite, trainer: pl.Trainer, batches: EpochBatches) -> str:
    """The same on all ranks, to be called on all: what the batches of those were whose doing it can be."""
    files = ", ".join(str(path) for path in batches.files_of(error.step))
    own = f"{error} on rank {trainer.global_rank}, batch {files}" if error.is_mine else None
    ranks = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, own)
    return (
        f"{'; '.join(filter(None, ranks))}: nothing was saved after the last checkpoint; "
        "look at these files, lower model.lr or set model.gradient_clip"
    )
