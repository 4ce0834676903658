"""Which sample when, and the random numbers that it is cut and turned with.

Everything depends on (seed, epoch, index) only: not on the number of workers or processes, nor on what was drawn
before, so that an interrupted run can go on exactly. No global random state is read or changed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from common.errors import UserError

ORDER_STREAM, SAMPLE_STREAM = 1, 2  # keep the random streams of order and samples apart


class SampleKey(NamedTuple):
    """What `EpochSampler` yields in place of a plain index: it carries the epoch to the data set, in every worker."""

    epoch: int
    index: int


class EpochSampler(Sampler[SampleKey]):
    """Walks a data set once an epoch in an order that depends on (seed, epoch), each process its share.

    Process r of n takes every n-th sample from the r-th on, so that n processes with batches of B see together what
    one process sees with batches of n·B. Call `set_epoch` before each epoch (Lightning does so by itself; it must be
    kept from replacing the sampler with Trainer(use_distributed_sampler=False)).

    Arguments:
        length: number of samples of the whole data set.
        rank, world_size: this process and the number of processes.
        shuffle: False walks in order.
        drop_last: leaves out the last samples that do not fill a round of all processes; otherwise the first samples
            are repeated to fill it.

    Raises:
        UserError: no sample, or with `drop_last` fewer samples than processes.
    """

    def __init__(
        self, length: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, shuffle=True, drop_last=False
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: ranks go from 0 to {world_size - 1}")
        if length < (world_size if drop_last else 1):
            raise UserError(
                f"{length} samples are too few for {world_size} processes: "
                f"give at least {world_size} files or start fewer processes"
            )
        self.length, self.seed = length, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch = self.position = 0

    @property
    def num_samples(self) -> int:
        """Samples of this process in a whole epoch."""
        return self.length // self.world_size if self.drop_last else -(-self.length // self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch is used from the next pass on. A new epoch starts at its beginning."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def resume(self, epoch: int, position: int) -> None:
        """The next pass is the rest of `epoch` after the `position` samples this process has already trained on."""
        if not 0 <= position <= self.num_samples:
            raise ValueError(f"position {position}: the epoch has {self.num_samples} samples for this process")
        self.epoch, self.position = epoch, position

    def __len__(self) -> int:
        return self.num_samples - self.position

    def __iter__(self) -> Iterator[SampleKey]:
        epoch, start = self.epoch, self.position
        for index in self.order(epoch)[start:]:
            yield SampleKey(epoch, index)
        if self.epoch == epoch:
            self.position = 0

    def order(self, epoch: int) -> list[int]:
        """The indices of this process in one epoch."""
        if self.shuffle:
            indices = generator_of(ORDER_STREAM, self.seed, epoch).permutation(self.length)
        else:
            indices = np.arange(self.length)
        whole = np.resize(indices, self.num_samples * self.world_size)  # cut, or filled from the start
        return whole[self.rank :: self.world_size].tolist()


class EpochDataset(torch.utils.data.Dataset):
    """Base of the data sets with random items: `_item(index, rng)` gets a generator of (seed, epoch, index).

    The epoch comes with the `SampleKey`s of an `EpochSampler`. Under another sampler, which yields plain indices, it is
    the one given to `set_epoch`; it lies in shared memory, so that persistent workers see it too.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The epoch of items that are asked for by plain index."""
        self._epoch.fill_(epoch)

    def __getitem__(self, key: int | SampleKey) -> dict[str, torch.Tensor | str]:
        epoch, index = key if isinstance(key, tuple) else (int(self._epoch), key)
        return self._item(index, sample_generator(self.seed, epoch, index))

    def _item(self, index: int, rng: np.random.Generator) -> dict[str, torch.Tensor | str]:
        raise NotImplementedError


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch."""
    return generator_of(SAMPLE_STREAM, seed, epoch, index)


def generator_of(*entropy: int) -> np.random.Generator:
    """Random numbers that depend on these alone."""
    return np.random.default_rng([int(number) % 2**63 for number in entropy])
