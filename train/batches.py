"""The order in which a run sees its latents: shuffled by (seed, epoch), split over ranks, resumable within an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.sampling import EpochSampler, SampleKey
from train.signals import ignore_signals


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


def make_loader(dataset: Dataset, sampler: GlobalBatchSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    """Batches (index (B,), latent (B, C, d, h, w), class id (B,), resolution / 64 (B, 3)).

    The loader has a generator of its own, so that it takes nothing from the global one.
    """
    return DataLoader(
        WithIndex(dataset),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_signals if num_workers else None,
        generator=torch.Generator().manual_seed(0),
    )


def close_loader(loader: DataLoader) -> None:
    """End the loading processes. They ignore signals, so leaving that to the interpreter's exit would hang."""
    if loader._iterator is not None:  # only set with persistent workers; there is no public way
        loader._iterator._shutdown_workers()


def endless(loader: DataLoader, start_epoch: Callable[[], None]) -> Iterator[list[Any]]:
    """Batches, epoch after epoch; `start_epoch` is called before each to say where it begins."""
    while True:
        start_epoch()
        yield from loader
