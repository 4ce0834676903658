"""Random choices of training: which sample when, which part of it, and how it is turned.

Everything depends on (seed, epoch, index) only: not on the number of workers or processes, nor on what was drawn
before, so that an interrupted run can go on exactly. No global random state is read or changed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from common.errors import UserError
from dataset.cache.crops import CroppedVolume
from dataset.volumes.intensity import foreground

MAX_DRAWS = 32  # crops tried before one is placed on a foreground voxel
SPARSE_SHARE = 0.1  # a crop with a smaller share of foreground counts as mostly background
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
        seed: seed of the order.
        shuffle: False walks in order.
        drop_last: leaves out the last samples that do not fill a round of all processes; otherwise the first samples
            are repeated to fill it.

    Raises:
        UserError: no sample, or with `drop_last` fewer samples than processes.
    """

    def __init__(
        self,
        length: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} processes: ranks go from 0 to {world_size - 1}")
        if length < (world_size if drop_last else 1):
            raise UserError(
                f"{length} samples are too few for {world_size} processes: "
                f"give at least {world_size} files or start fewer processes"
            )
        self.length = length
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0

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
            indices = _generator(ORDER_STREAM, self.seed, epoch).permutation(self.length)
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
    return _generator(SAMPLE_STREAM, seed, epoch, index)


def _generator(*entropy: int) -> np.random.Generator:
    return np.random.default_rng([int(number) % 2**63 for number in entropy])


def random_crop(
    volume: CroppedVolume, size: Sequence[int], rng: np.random.Generator, background_keep: float = 1.0
) -> tuple[tuple[int, int, int], torch.Tensor]:
    """A random crop of `size` that holds at least one voxel of the foreground: where it begins, and (1, *size) of it.

    Crops are drawn uniformly from those that overlap the foreground's box, hence uniformly among those with foreground.
    Crops mostly of background (less than 10 % foreground) are kept with the probability `background_keep`. After a few
    draws without success it takes the fullest crop seen, or places one on a known voxel of the foreground: there is no
    endless redrawing. Only the crops that are drawn are read.

    A volume shorter than `size` along an axis lies in the middle of its crops, with background around it.
    """
    size = np.array(size)
    lowest, highest = _crop_starts(volume.shape, size)
    if not np.array_equal(lowest, highest):
        lowest = np.maximum(lowest, volume.foreground.first - size + 1)
        highest = np.minimum(highest, volume.foreground.last)
    if np.array_equal(lowest, highest):
        return _as_tuple(lowest), volume.crop(lowest, size)
    best_share, best = 0.0, None
    for _ in range(MAX_DRAWS):
        start = rng.integers(lowest, highest + 1)
        crop = volume.crop(start, size)
        share = np.count_nonzero(foreground(crop.numpy())) / crop.numel()  # several times as fast as with torch
        if share >= SPARSE_SHARE or (share > 0 and rng.random() < background_keep):
            return _as_tuple(start), crop
        if share > best_share:
            best_share, best = share, (_as_tuple(start), crop)
    if best is not None:
        return best
    voxel = rng.choice(volume.foreground.voxels)
    start = rng.integers(np.maximum(voxel - size + 1, lowest), np.minimum(voxel, highest) + 1)
    return _as_tuple(start), volume.crop(start, size)


def _crop_starts(shape: Sequence[int], size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest start of a crop; along an axis shorter than it the one that has the volume in its middle.

    That start is negative: so many voxels of background come first.
    """
    spare = np.array(shape) - size
    front = -(np.maximum(-spare, 0) // 2)
    return front, np.where(spare > 0, spare, front)


def centre_crop_start(shape: Sequence[int], size: Sequence[int]) -> tuple[int, int, int]:
    """Where the crop of `size` in the middle of a volume begins."""
    return tuple((extent - length) // 2 for extent, length in zip(shape, size, strict=True))


def augment(data: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Flips of the NIfTI axes x and y (probability 1/2 each) and a quarter turn in their plane (probability 1/2).

    data: (1, D, H, W); x and y are H and W. Where H and W differ there is no turn, since it would change the shape and
    with it which volumes can share a batch.
    """
    flip_h, flip_w, turn = rng.random(3) < 0.5
    flipped = [axis for axis, chosen in ((-2, flip_h), (-1, flip_w)) if chosen]
    if flipped:
        data = data.flip(flipped)
    if turn and data.shape[-2] == data.shape[-1]:
        data = data.rot90(1, (-2, -1))
    return data.contiguous()


def _as_tuple(start: np.ndarray) -> tuple[int, int, int]:
    return tuple(int(first) for first in start)
