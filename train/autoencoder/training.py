"""Training of the Patch-Volume autoencoder, both stages: `train(cfg, stage)` is what the two scripts call.

Everything of a run lies in `model.default_root_dir`:
    config.yaml     the resolved configuration
    split.json      which files train and which validate
    checkpoints/    last.ckpt, step-0003000.ckpt …, and best-… : the three best by val/recon_loss
    logs/           TensorBoard
    metrics.jsonl   the same numbers, one line of JSON per logged step and per validation
    volumes/        input and reconstruction of the VolumeLogger
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import BatchSampler, DataLoader, Sampler

from AutoEncoder.model.PatchVolume import AE_finetuning
from common.compilation import compiling
from common.errors import UserError
from common.files import lock_folder
from common.log import close_logger, get_logger
from config.loading import require, save_config
from dataset.cache.volumes import VolumeCache
from dataset.checking.before_training import check_volumes
from dataset.order.epochs import EpochSampler
from dataset.order.split import keep_split, split_dataset
from dataset.volumes.index import read_dataset_json
from dataset.vqgan import VQGANDataset
from dataset.vqgan_4x import VQGANDataset_4x
from train.autoencoder.checkpoint_io import BackgroundCheckpointIO
from train.autoencoder.model import build_autoencoder, prepare_for_training
from train.autoencoder.monitoring import JsonLinesLogger, TrainingMonitor
from train.autoencoder.resume import global_step, load_weights
from train.autoencoder.step_watch import NotFinite, StepWatch, TrainingStopped
from train.autoencoder.strategy import TwoPassDDPStrategy
from train.callbacks import RandomState, StepProgress, VolumeLogger
from train.diffusion.batches import close_loader
from train.loop.background import BackgroundWork
from train.loop.signals import ignore_signals

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
    _check_options(cfg, stage)
    root = Path(cfg.model.default_root_dir)
    checkpoints = root / "checkpoints"
    logger = get_logger(_rank())

    with ExitStack() as closing:
        closing.callback(close_logger)

        # Data: headers, and a few files whole
        train_data, val_data = _datasets(cfg, logger)
        logger.info("stage %d: %d training and %d validation files", stage, len(train_data), len(val_data))
        if _rank() == 0:  # where it fails, the launcher ends the others too
            headers = {header.path: header for header in (*train_data.headers, *val_data.headers)}
            files = read_dataset_json(cfg.dataset.root_dir)
            check_volumes(cfg.dataset.root_dir, files, headers.values(), cfg.dataset.intensity_range, logger)

        # Model; the seed makes all ranks start from the same weights
        pl.seed_everything(cfg.model.seed, verbose=False)
        model = build_autoencoder(cfg)
        resume = load_weights(cfg, model, root, logger)
        start_step = 0 if resume is None else global_step(resume)
        prepare_for_training(model)

        # Trainer
        with quiet_lightning():
            monitor, work = TrainingMonitor(cfg, logger), BackgroundWork()
            trainer = _trainer(cfg, root, checkpoints, stage, start_step, monitor, work)
        if trainer.is_global_zero:  # an error here ends the other processes too, by the launcher
            _make_folder(root)
            closing.enter_context(lock_folder(root, "training"))  # before anything of a run that goes on is replaced
            _keep_split(cfg, root, is_resumed=any(checkpoints.glob("*.ckpt")))
            save_config(cfg, root)
        closing.enter_context(work)
        train_loader, val_loader = _loaders(cfg, trainer, train_data, val_data)
        for loader in filter(None, (train_loader, val_loader)):
            closing.callback(close_loader, loader)

        # Resume
        last_step = _last_step(cfg, len(train_loader))
        trainer.fit_loop.epoch_loop.max_steps = last_step
        if resume is not None:
            if 0 <= last_step <= start_step:
                logger.info("%s: finished at step %d; raise model.max_steps or max_epochs to go on", root, start_step)
                return {}
            logger.info("resuming from %s at step %d", resume, start_step)

        # Cache, once for all runs and ranks; with it all files are checked
        if train_data.cache is not None:
            folders = {**train_data.class_folders, **val_data.class_folders}
            train_data.cache.build(folders, cfg.model.num_workers, logger)

        # Train
        try:
            with quiet_lightning(), compiling("model.compile", "set it to false"):
                trainer.fit(model, monitor.meter.timed(train_loader), val_loader, ckpt_path=resume, weights_only=True)
        except TrainingStopped as stop:
            logger.info("%s at step %d: last.ckpt saved", stop, trainer.global_step)
            raise SystemExit(128 + stop.signal_number) from None
        except NotFinite as error:
            raise UserError(_describe(error, trainer, train_loader.batch_sampler)) from error
        trainer.save_checkpoint(checkpoints / "last.ckpt", weights_only=False)
        work.wait()
        logger.info("finished at step %d: %s", trainer.global_step, checkpoints / "last.ckpt")
        return {name: value.item() for name, value in trainer.callback_metrics.items()}


def _describe(error: NotFinite, trainer: pl.Trainer, batches: "EpochBatches") -> str:
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


def _check_options(cfg: DictConfig, stage: int) -> None:
    require(cfg, "dataset.root_dir", "model.default_root_dir")
    if cfg.model.stage != stage:
        raise UserError(f"model.stage is {cfg.model.stage}, but this script trains stage {stage}: use the other script")
    if stage == 2:
        require(cfg, "model.resume_from_checkpoint")
    source = cfg.model.resume_from_checkpoint
    if source is not None and not Path(source).is_file():
        raise UserError(f"model.resume_from_checkpoint: {source}: no such checkpoint file")
    if cfg.model.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("model.accelerator is gpu, but no CUDA device was found: set model.accelerator=cpu or auto")
    on_gpu = cfg.model.accelerator != "cpu" and torch.cuda.is_available()
    wanted = _processes_per_node(cfg)
    if on_gpu and wanted > torch.cuda.device_count():
        raise UserError(
            f"{wanted} processes on this node (model.gpus, or torchrun's --nproc-per-node), but it has "
            f"{torch.cuda.device_count()} GPUs: start as many, or set model.accelerator=cpu"
        )
    if cfg.dataset.image_channels != 1:
        raise UserError(f"dataset.image_channels is {cfg.dataset.image_channels}, but volumes are read with 1 channel")


def _datasets(cfg: DictConfig, logger: logging.Logger) -> tuple[VQGANDataset, VQGANDataset]:
    dataset = VQGANDataset_4x if cfg.model.downsample[0] == 4 else VQGANDataset
    options = dict(
        stage=cfg.model.stage,
        patch_size=cfg.dataset.patch_size,
        intensity_range=cfg.dataset.intensity_range,
        val_fraction=cfg.dataset.val_fraction,
        split_seed=cfg.dataset.split_seed,
        subject_pattern=cfg.dataset.subject_pattern,
        seed=cfg.model.seed,
        background_keep=cfg.dataset.background_keep,
        cache=_cache(cfg, logger),
    )
    train_data = dataset(cfg.dataset.root_dir, cfg.dataset.augmentation, "train", **options)
    shapes = {train_data.item_shape(index) for index in range(len(train_data))}
    if len(shapes) > 1 and cfg.model.batch_size > 1:
        found = ", ".join(" ".join(map(str, shape)) for shape in sorted(shapes)[:4])
        raise UserError(
            f"model.batch_size is {cfg.model.batch_size}, but the volumes have different sizes (z x y: {found}): "
            "set model.batch_size=1"
        )
    return train_data, dataset(cfg.dataset.root_dir, False, "val", **options)


def _cache(cfg: DictConfig, logger: logging.Logger) -> VolumeCache | None:
    dtype, folder, limit_gb = cfg.dataset.cache, cfg.dataset.cache_dir, cfg.dataset.cache_limit_gb
    if dtype != "none":
        return VolumeCache(dtype, cfg.dataset.intensity_range, folder, limit_gb)
    if folder is not None or limit_gb is not None:
        logger.warning("dataset.cache is none: dataset.cache_dir and dataset.cache_limit_gb have no effect")
    return None


def _make_folder(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"model.default_root_dir: {root}: cannot be made ({error.strerror or error})") from error


def _keep_split(cfg: DictConfig, root: Path, is_resumed: bool) -> None:
    keys = ("val_fraction", "split_seed", "subject_pattern")
    split = split_dataset(cfg.dataset.root_dir, *(cfg.dataset[key] for key in keys))
    keep_split(root, cfg.dataset.root_dir, split, {key: cfg.dataset[key] for key in keys}, is_resumed)


def _rank() -> int:
    """This process's place among all, before the trainer knows it."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0)))


def _processes_per_node(cfg: DictConfig) -> int:
    """Under torchrun the number of processes is its own; otherwise Lightning starts `gpus` of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", cfg.model.gpus))


def _trainer(
    cfg: DictConfig,
    root: Path,
    checkpoints: Path,
    stage: int,
    start_step: int,
    monitor: TrainingMonitor,
    work: BackgroundWork,
) -> pl.Trainer:
    world_size = int(os.environ.get("WORLD_SIZE", cfg.model.gpus))
    per_node = _processes_per_node(cfg)
    validate_by_step = cfg.model.val_every is not None
    callbacks = [
        ModelCheckpoint(
            checkpoints,
            "best-{step:07d}-{val/recon_loss:.4f}",
            monitor="val/recon_loss",
            save_top_k=3,
            auto_insert_metric_name=False,
        ),
        ModelCheckpoint(
            checkpoints,
            "step-{step:07d}",
            every_n_train_steps=cfg.model.checkpoint_every,
            save_top_k=-1,
            auto_insert_metric_name=False,
        ),
        StepWatch(checkpoints / "last.ckpt", work),
        RandomState(),
        StepProgress(f"stage {stage}"),
        monitor,
    ]
    if cfg.model.log_volume_every > 0:
        callbacks.append(VolumeLogger(root / "volumes", cfg.model.log_volume_every, work))
    if stage == 2:
        callbacks.append(AE_finetuning())
    return pl.Trainer(
        accelerator=cfg.model.accelerator,
        devices=per_node,
        num_nodes=world_size // per_node,
        strategy=TwoPassDDPStrategy() if world_size > 1 else "auto",
        precision=PRECISIONS[str(cfg.model.precision)],
        max_epochs=-1,  # `_last_step` counts in steps alone
        val_check_interval=cfg.model.val_every,
        check_val_every_n_epoch=None if validate_by_step else 1,
        num_sanity_val_steps=0,
        log_every_n_steps=cfg.model.log_every,
        logger=[
            TensorBoardLogger(root, name="", version="logs", purge_step=start_step or None),
            JsonLinesLogger(root / "metrics.jsonl", start_step),
        ],
        callbacks=callbacks,
        plugins=[BackgroundCheckpointIO(work)],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )


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


class EpochBatches(Sampler[list]):
    """Batches of one rank; each pass is the rest of the epoch that the present optimiser step belongs to.

    Every batch is one optimiser step, so the step alone tells the place. Lightning's count of epochs, which moves on
    whenever training ends, and its passes, of which it begins some in vain, play no part. The length is always that of
    a whole epoch, as Lightning counts the batches of a resumed epoch from its beginning.
    """

    def __init__(
        self, order: EpochSampler, batch_size: int, files: list[Path], current_step: Callable[[], int]
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.files = files
        self.current_step = current_step

    def __len__(self) -> int:
        return -(-self.order.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list]:
        epoch, batch = divmod(self.current_step(), len(self))
        self.order.resume(epoch, batch * self.batch_size)
        yield from BatchSampler(self.order, self.batch_size, drop_last=False)

    def files_of(self, step: int) -> list[Path]:
        """The files of the batch of optimiser step `step`."""
        epoch, batch = divmod(step, len(self))
        indices = self.order.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [self.files[index] for index in indices]


def _loaders(
    cfg: DictConfig, trainer: pl.Trainer, train_data: VQGANDataset, val_data: VQGANDataset
) -> tuple[DataLoader, DataLoader | None]:
    workers = dict(num_workers=cfg.model.num_workers, persistent_workers=cfg.model.num_workers > 0)
    workers["worker_init_fn"] = ignore_signals
    workers["pin_memory"] = trainer.strategy.root_device.type == "cuda"
    # Starting a pass draws a number: from a generator of its own, so that a resumed epoch leaves the global one alone.
    workers["generator"] = torch.Generator()
    ranks = dict(rank=trainer.global_rank, world_size=trainer.world_size)
    sampler = EpochSampler(len(train_data), seed=cfg.model.seed, **ranks)
    batches = EpochBatches(sampler, cfg.model.batch_size, train_data.files, lambda: trainer.global_step)
    train_loader = DataLoader(train_data, batch_sampler=batches, **workers)
    if not len(val_data):
        return train_loader, None
    val_sampler = EpochSampler(len(val_data), shuffle=False, **ranks)
    return train_loader, DataLoader(val_data, batch_size=1, sampler=val_sampler, **workers)


def _last_step(cfg: DictConfig, steps_per_epoch: int) -> int:
    """The optimiser step that training ends at, by `max_steps` or `max_epochs`, whichever comes first; -1: never."""
    limits = [cfg.model.max_steps, cfg.model.max_epochs * steps_per_epoch]
    return min((limit for limit in limits if limit >= 0), default=-1)
