"""The order in which a run sees its latents: shuffled by (seed, epoch), split over ranks, resumable within an epoch."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.cache.latents import LatentCache
from dataset.order.epochs import EpochSampler, SampleKey
from dataset.Singleres_dataset import Singleres_dataset
from train.loop.signals import ignore_signals


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """This rank's share of each global batch.

    A global batch is the next `batch_size * world_size` samples of the epoch's order; rank r has its samples r,
    r + world_size, ... So the same samples make up a step however they are split. The last samples of an epoch that
    fill no global batch are left out: the batch size is constant.

    Args:
        sampler: walks this rank's samples, with `drop_last`.
        batch_size: samples per rank and step.
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
    reading them. Reading a file leaves the interpreter to the training.

    Args:
        num_threads: each reads a whole batch, ahead; 0: a batch is read when it is asked for.
        pin_memory: see `make_loader`; in memory that the threads fill, so that nothing is copied for it.
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
        """End the threads."""
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
    """Batches [index (B,), latent (B, C, d, h, w), class id (B,), resolution / 64 (B, 3)].

    sampler: the samples of each batch of a pass.
    num_workers: processes that load, or with a cache threads; 0: neither. The order of batches is the same.
    pin_memory: in page-locked memory, from where a GPU fetches them beside its work. Needs a GPU.

    The loader has a generator of its own, so that it takes nothing from the global one.
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
        generator=torch.Generator().manual_seed(0),
    )


def close_loader(loader: DataLoader | CacheLoader) -> None:
    """End what loads. Processes ignore signals, so leaving that to the interpreter's exit would hang."""
    if isinstance(loader, CacheLoader):
        loader.close()
    elif loader._iterator is not None:  # only set with persistent workers; there is no public way
        loader._iterator._shutdown_workers()


def endless(loader: DataLoader | CacheLoader, start_epoch: Callable[[], None]) -> Iterator[list[Any]]:
    """Batches, epoch after epoch; `start_epoch` is called before each to say where it begins."""
    while True:
        start_epoch()
        yield from loader
