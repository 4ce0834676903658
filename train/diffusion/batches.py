"""A run's batches of latents: shuffled by (seed, epoch), split over ranks, resumable within an epoch."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.files import check_still_there
from dataset.cache.latents import LatentCache
from dataset.order.epochs import EpochSampler, SampleKey
from dataset.Singleres_dataset import Singleres_dataset
from train.diffusion.checks import check_split_of_run
from train.loop.session import Session
from train.loop.signals import close_loader, ignore_signals


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """This rank's share of each global batch.

    A global batch is the next `batch_size * world_size` samples of the epoch's order; rank r has its samples r,
    r + world_size, ... So the same samples make up a step however they are split. The last samples of an epoch that
    fill no global batch are left out: the batch size is constant. `sampler` walks this rank's samples, with
    `drop_last`; `batch_size` is that of a rank.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int) -> None:
        self.sampler = sampler
        self.batch_size = batch_size

    def start_at(self, epoch: int, samples_seen: int = 0) -> None:
        """Begin `epoch` after its first `samples_seen` samples, counted over all ranks."""
        self.sampler.resume(epoch, min(samples_seen // self.sampler.world_size, self.sampler.num_samples))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        keys = list(self.sampler)
        for first in range(0, len(keys) - self.batch_size + 1, self.batch_size):
            yield keys[first : first + self.batch_size]

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.num_samples // self.batch_size

    @property
    def positions(self) -> range:
        """Place of each sample of this rank's batch in the global batch."""
        return range(self.sampler.rank, self.batch_size * self.sampler.world_size, self.sampler.world_size)


class WithIndex(Dataset):
    """A data set whose items start with their index, by which a failing batch's files can be named."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: SampleKey) -> tuple[Any, ...]:
        return (key.index, *self.dataset[key])

    def __len__(self) -> int:
        return len(self.dataset)


class CacheLoader:
    """The batches of `make_loader`, read from the cache by threads of this process, each straight into its place.

    Loading processes would have to hand batches over through shared memory, which takes several times as long as
    reading them. Reading a file leaves the interpreter to the training. Each thread reads a whole batch, ahead, with
    `pin_memory` into page-locked memory, so that nothing is copied for it; without threads a batch is read when it is
    asked for.
    """

    def __init__(
        self, dataset: Singleres_dataset, sampler: Iterable[list[SampleKey]], num_threads: int, pin_memory: bool
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.num_threads = num_threads
        self.pin_memory = pin_memory
        self._threads = ThreadPoolExecutor(num_threads, "batches") if num_threads else None

    def __iter__(self) -> Iterator[list[Tensor]]:
        ahead: deque[Future] = deque()  # one batch for each thread, and one that is ready
        for keys in self.sampler:
            batch = self._make_room([key.index for key in keys])
            if self._threads is None:
                yield self._fill(batch)
                continue
            ahead.append(self._threads.submit(self._fill, batch))
            if len(ahead) > self.num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _make_room(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch without its latents. Made in the training's thread, whose GPU owns pinned memory."""
        size, data = len(indices), self.dataset
        latents = torch.empty((size, *data.shapes[0]), pin_memory=self.pin_memory)
        small = [torch.tensor(indices), torch.tensor([data.labels[index] for index in indices])]
        small.append(data.resolution_condition.repeat(size, 1))
        index, label, resolution = (tensor.pin_memory() if self.pin_memory else tensor for tensor in small)
        return [index, latents, label, resolution]

    def _fill(self, batch: list[Tensor]) -> list[Tensor]:
        for index, latent in zip(batch[0].tolist(), batch[1], strict=True):
            self.dataset.cache.read_into(self.dataset.files[index], latent)
        return batch


def make_cache(cfg: DictConfig, logger: logging.Logger) -> LatentCache | None:
    """The cache that the options ask for, to be built; a warning where they have no effect."""
    if cfg.cache != "none":
        return LatentCache(cfg.cache_dir, cfg.cache_limit_gb)
    if cfg.cache_dir is not None or cfg.cache_limit_gb is not None:
        logger.warning("cache is none: cache_dir and cache_limit_gb have no effect")
    return None


def make_loader(
    dataset: Singleres_dataset, sampler: Iterable[list[SampleKey]], num_workers: int, pin_memory: bool
) -> DataLoader | CacheLoader:
    """Batches [index (B,), latent (B, C, d, h, w), class id (B,), resolution / vq_size (B, 3)].

    num_workers: processes that load, or with a cache threads; 0: neither. The order of batches is the same.
    pin_memory: in page-locked memory, from where a GPU fetches them beside its work. Needs a GPU.
    """
    if dataset.cache is not None:
        return CacheLoader(dataset, sampler, num_workers, pin_memory)
    return DataLoader(
        WithIndex(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals if num_workers else None,
        generator=torch.Generator().manual_seed(0),  # its own, so that nothing is taken from the global one
    )


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the CPU."""

    indices: Tensor  # (B,) of the data set, by which a failing batch's files can be named
    latents: Tensor  # (B, C, d, h, w), normalised
    conditions: dict[str, Tensor]  # what the denoiser is given beside (x, t), (B, …) each

    def to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditions on a device, copied beside its work where they lie in pinned memory."""
        conditions = {name: value.to(device, non_blocking=True) for name, value in self.conditions.items()}
        return self.latents.to(device, non_blocking=True), conditions


class LatentBatches:
    """Latents of one size with their conditions, epoch after epoch.

    Args:
        dataset: its cache, if it has one, has to be built (`build_cache`) before the first batch.
        batch_size: latents per rank and step.
        seed: of the order.
        num_workers: see `make_loader`.
        here: this process, whose end ends what loads.
    """

    def __init__(self, dataset: Singleres_dataset, batch_size: int, seed: int, num_workers: int, here: Session) -> None:
        ranks = here.distributed
        order = EpochSampler(len(dataset), seed=seed, drop_last=True, rank=ranks.rank, world_size=ranks.world_size)
        self._dataset, self._num_workers = dataset, num_workers
        self._sampler = GlobalBatchSampler(order, batch_size)
        self._loader = make_loader(dataset, self._sampler, num_workers, pin_memory=here.device.type == "cuda")
        here.closing.callback(close_loader, self._loader)
        self.files = dataset.files
        self.num_samples = len(dataset)
        self.global_batch = batch_size * ranks.world_size  # latents per step over all ranks
        self.steps_per_epoch = self._sampler.steps_per_epoch
        self.positions = self._sampler.positions  # of this rank's samples in the global batch

    @property
    def classes(self) -> list[int]:
        """Class ids that there are latents of."""
        return sorted(set(self._dataset.labels))

    @property
    def remedy_for_waiting(self) -> str:
        """What to change where training waits for batches."""
        cache = "none" if self._dataset.cache is None else "float32"
        return f"raise num_workers (now {self._num_workers}), or set cache=float32 (now {cache}) with a fast cache_dir"

    def check_run(self, folder: Path) -> None:
        """UserError where a run's folder says that it trains on other data. To be called on rank 0."""
        check_split_of_run(self._dataset, folder)

    def build_cache(self, logger: logging.Logger) -> None:
        """Copy into the cache what is not there yet, if there is one. Errors as of `LatentCache.build`."""
        if self._dataset.cache is not None:
            self._dataset.cache.build(self._dataset.class_folders, self._num_workers, logger)

    def check_still_there(self) -> None:
        """UserError where latents were deleted since the start, which the cache hides."""
        check_still_there(
            self.files, "latents", "training went on with their copies in the cache, and its end is saved"
        )

    def endless(self, position: Callable[[], tuple[int, int]]) -> Iterator[Batch]:
        """Batches; `position`, asked before each epoch, gives it and how many of its samples are done on all ranks."""
        while True:
            self._sampler.start_at(*position())
            yield from map(_as_batch, self._loader)  # unlike a loop it keeps no batch until the next one has come


def _as_batch(item: list[Tensor]) -> Batch:
    indices, latents, labels, resolution = item
    return Batch(indices, latents, {"y": labels, "res": resolution})
