"""What the autoencoder's training reads: the split of its files, data sets, and batches in an order that resumes."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch.utils.data import BatchSampler, DataLoader, Sampler

from common.errors import UserError
from common.parallel import num_cores
from dataset.cache.volumes import VolumeCache
from dataset.order.data_split import NO_SPLIT, sides_of
from dataset.order.epochs import EpochSampler
from dataset.order.split import Split, began_by_itself
from dataset.vqgan import VQGANDataset
from dataset.vqgan_4x import VQGANDataset_4x
from train.loop.signals import ignore_signals

SPLIT_OPTIONS = ("split", "val_fraction", "split_seed", "subject_pattern")  # of `dataset`, in the order of `sides_of`


def split_files(cfg: DictConfig) -> Split:
    """Which files train and which validate. A run that began with a split of its own goes on with it."""
    options = {key: cfg.dataset[key] for key in SPLIT_OPTIONS}
    if options["split"] is None and began_by_itself(cfg.model.default_root_dir):
        options["split"] = NO_SPLIT
    return sides_of(cfg.dataset.root_dir, *options.values())


def build_datasets(cfg: DictConfig, split: Split, logger: logging.Logger) -> tuple[VQGANDataset, VQGANDataset]:
    """Training and validation data, of which only headers are read here."""
    dataset = VQGANDataset_4x if cfg.model.downsample[0] == 4 else VQGANDataset
    options = dict(
        stage=cfg.model.stage,
        patch_size=cfg.dataset.patch_size,
        intensity_range=cfg.dataset.intensity_range,
        val_fraction=cfg.dataset.val_fraction,
        split_seed=cfg.dataset.split_seed,
        limit=cfg.model.val_volumes,
        sides=split,
        seed=cfg.model.seed,
        background_keep=cfg.dataset.background_keep,
        check=False,  # rank 0 does so
        affines=True,  # for pictures
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


def build_loaders(
    cfg: DictConfig, trainer: pl.Trainer, train_data: VQGANDataset, val_data: VQGANDataset
) -> tuple[DataLoader, DataLoader | None]:
    """This rank's batches, by an `EpochBatches`, and volumes to validate on, if there are any."""
    num_workers = min(cfg.model.num_workers, num_cores())
    workers = dict(num_workers=num_workers, persistent_workers=num_workers > 0)
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
