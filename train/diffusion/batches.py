"""A run's batches of latents: each of one size, shuffled by (seed, epoch), split over ranks, resumable in an epoch."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from common.files import check_still_there
from common.parallel import num_cores
from dataset.cache.latents import LatentCache
from dataset.Multires_dataset import Grid, Multires_dataset
from dataset.order.buckets import TURNS, BucketOrder
from dataset.order.data_split import SPLIT_NAME, TRAINING, read_split
from dataset.order.epochs import SampleKey
from dataset.volumes.geometry import size_text
from train.loop.session import Session
from train.loop.signals import close_loader, ignore_signals


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """This rank's share of each global batch, an epoch at a time.

    Rank r has a global batch's samples r, r + world_size, ... So the same samples make up a step however they are
    split. The last samples of a bucket that fill no global batch are left out: the batch size is constant. `order`
    has the batch sizes over all ranks.
    """

    def __init__(self, order: BucketOrder, rank: int = 0, world_size: int = 1) -> None:
        self.order, self.rank, self.world_size = order, rank, world_size
        self._epoch = self._first_step = 0

    def start_at(self, epoch: int, samples_seen: int = 0) -> None:
        """Begin `epoch` after its first `samples_seen` samples, counted over all ranks."""
        self._epoch, self._first_step = epoch, self.order.steps_done(epoch, samples_seen)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for _, indices in self.order.batches(self._epoch, self._first_step):
            yield [SampleKey(self._epoch, index) for index in indices[self.rank :: self.world_size]]

    def __len__(self) -> int:
        return self.order.steps_per_epoch - self._first_step


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
        self, dataset: Multires_dataset, sampler: Iterable[list[SampleKey]], num_threads: int, pin_memory: bool
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
        latents = torch.empty((len(indices), *self.dataset.item_shape(indices[0])), pin_memory=self.pin_memory)
        small = [torch.tensor(indices), *self.dataset.conditions(indices)]
        index, *conditions = (tensor.pin_memory() if self.pin_memory else tensor for tensor in small)
        return [index, latents, *conditions]

    def _fill(self, batch: list[Tensor]) -> list[Tensor]:
        for index, latent in zip(batch[0].tolist(), batch[1], strict=True):
            self.dataset.read_into(index, latent)
        return batch


def passes_of(batch_size: int, accumulate: int) -> list[slice]:
    """A batch in at most `accumulate` parts, which differ by one sample at most."""
    ends = [batch_size * part // accumulate for part in range(accumulate + 1)]
    return [slice(first, end) for first, end in pairwise(ends) if end > first]


@dataclass(frozen=True)
class Origin:
    """What made the latents of a run: the autoencoder (where it was given), on the CPU, and its fingerprint."""

    autoencoder: nn.Module | None = None
    fingerprint: str | None = None  # None: not known


def apart(dataset: Multires_dataset, items: Tensor, conditions: Iterable[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Latents (B, C, d, h, w) of items, and what the denoiser is told of them by its names for it.

    conditions: as of `Multires_dataset.conditions`; hints lie behind the latents' channels.
    """
    named = dict(zip(("y", "res", "attributes"), conditions, strict=False))
    if not dataset.num_hint_channels:
        return items, named
    return items[:, : dataset.num_channels], {**named, "hint": items[:, dataset.num_channels :]}


def make_cache(cfg: DictConfig, logger: logging.Logger) -> LatentCache | None:
    """The cache that the options ask for, to be built; a warning where they have no effect."""
    if cfg.cache != "none":
        return LatentCache(cfg.cache_dir, cfg.cache_limit_gb)
    if cfg.cache_dir is not None or cfg.cache_limit_gb is not None:
        logger.warning("cache is none: cache_dir and cache_limit_gb have no effect")
    return None


def make_loader(
    dataset: Multires_dataset, sampler: Iterable[list[SampleKey]], num_workers: int, pin_memory: bool
) -> DataLoader | CacheLoader:
    """Batches [index (B,), latent (B, C, d, h, w), class id (B,), grid / vq_size (B, 3)], and attributes (B, A) if any.

    num_workers: processes that load, or with a cache threads; 0: neither. The order of batches is the same.
    pin_memory: in page-locked memory, from where a GPU fetches them beside its work. Needs a GPU.
    """
    if dataset.cache is not None:
        return CacheLoader(dataset, sampler, num_workers, pin_memory)
    return DataLoader(
        WithIndex(dataset),
        batch_sampler=sampler,
        num_workers=min(num_workers, num_cores()),
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
    positions: range  # of its samples in the global batch
    global_size: int  # samples of the step over all ranks

    @property
    def grid(self) -> Grid:
        return tuple(self.latents.shape[2:])

    @property
    def size(self) -> str:
        """The grid for messages and figures: "32x32x32"."""
        return size_text(self.grid)

    def to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents and conditions on a device, copied beside its work where they lie in pinned memory."""
        conditions = {name: value.to(device, non_blocking=True) for name, value in self.conditions.items()}
        return self.latents.to(device, non_blocking=True), conditions


class LatentBatches:
    """Latents with their conditions, epoch after epoch; the latents of a batch have one size.

    Args:
        dataset: its cache, if it has one, has to be built (`build_cache`) before the first batch.
        batch_sizes: latents per rank and step, of each size; one number for all.
        seed: of the order.
        num_workers: see `make_loader`.
        here: this process, whose end ends what loads.
        order, temperature, weights: as of `BucketOrder`.
    """

    def __init__(
        self,
        dataset: Multires_dataset,
        batch_sizes: int | Mapping[Grid, int],
        seed: int,
        num_workers: int,
        here: Session,
        order: str = TURNS,
        temperature: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        ranks = here.distributed
        sizes = dict.fromkeys(dataset.buckets, batch_sizes) if isinstance(batch_sizes, int) else batch_sizes
        self._global_sizes = {grid: sizes[grid] * ranks.world_size for grid in dataset.buckets}
        self.order = BucketOrder(
            list(dataset.buckets.values()), list(self._global_sizes.values()), seed, order, temperature, weights
        )
        self._ranks, self._dataset, self._num_workers = ranks, dataset, num_workers
        self._sampler = GlobalBatchSampler(self.order, ranks.rank, ranks.world_size)
        self._loader = make_loader(dataset, self._sampler, num_workers, pin_memory=here.device.type == "cuda")
        here.closing.callback(close_loader, self._loader)
        self.files = dataset.files
        self.steps_per_epoch = self.order.steps_per_epoch

    @property
    def kinds(self) -> list[tuple[int, Grid]]:
        """Class ids that there are latents of, in each of their sizes."""
        return sorted({(label, s[1:]) for label, s in zip(self._dataset.labels, self._dataset.shapes, strict=True)})

    def pass_shapes(self, accumulate: int) -> set[tuple[int, Grid]]:
        """Batch size and grid of each pass that a step of a rank can have."""
        sizes = {grid: size // self._ranks.world_size for grid, size in self._global_sizes.items()}
        passes = {grid: passes_of(size, accumulate) for grid, size in sizes.items()}
        return {(part.stop - part.start, grid) for grid, parts in passes.items() for part in parts}

    @property
    def num_samples(self) -> int | dict[str, int]:
        """Latents that there are; of several sizes, of each."""
        counts = {size_text(grid): len(indices) for grid, indices in self._dataset.buckets.items()}
        return counts if len(counts) > 1 else len(self._dataset)

    @property
    def global_batch(self) -> int | dict[str, int]:
        """Latents per step over all ranks; of several sizes, of each."""
        sizes = {size_text(grid): size for grid, size in self._global_sizes.items()}
        return sizes if len(sizes) > 1 else next(iter(sizes.values()))

    @property
    def remedy_for_waiting(self) -> str:
        """What to change where training waits for batches."""
        cache = "none" if self._dataset.cache is None else "float32"
        return f"raise num_workers (now {self._num_workers}), or set cache=float32 (now {cache}) with a fast cache_dir"

    def hint_of(self, class_id: int, grid: Grid) -> Tensor | None:
        """That of the first latent of a class and size, (1, H, d, h, w); None where there are no hints."""
        if not self._dataset.num_hint_channels:
            return None
        index = next(i for i in self._dataset.buckets[grid] if self._dataset.labels[i] == class_id)
        return self._dataset[index][0][None, self._dataset.num_channels :]

    def check_run(self, folder: Path) -> None:
        """UserError where a run's folder says that it trains on other data. To be called on rank 0."""
        _check_split_of_run(self._dataset, folder)

    def build_cache(self, logger: logging.Logger) -> None:
        """Copy into the cache what is not there yet, if there is one. Errors as of `LatentCache.build`."""
        if self._dataset.cache is not None:
            self._dataset.build_cache(self._num_workers, logger)

    def check_still_there(self) -> None:
        """UserError where latents were deleted since the start, which the cache hides."""
        check_still_there(
            self.files, "latents", "training went on with their copies in the cache, and its end is saved"
        )

    def endless(self, position: Callable[[], tuple[int, int]]) -> Iterator[Batch]:
        """Batches; `position`, asked before each epoch, gives it and how many of its samples are done on all ranks."""
        while True:
            self._sampler.start_at(*position())
            yield from map(self._as_batch, self._loader)  # unlike a loop it keeps no batch until the next one has come

    def _as_batch(self, item: list[Tensor]) -> Batch:
        indices, items, *conditions = item
        latents, named = apart(self._dataset, items, conditions)
        size = len(indices) * self._ranks.world_size
        return Batch(indices, latents, named, range(self._ranks.rank, size, self._ranks.world_size), size)


def _check_split_of_run(dataset: Multires_dataset, folder: Path) -> None:
    """Notes in a run's folder who it trains on. UserError where a subject has changed sides since the run began.

    Subjects that are new since then are no matter.
    """
    if dataset.split is None:
        return
    record = folder / SPLIT_NAME
    if record.is_file():
        before, now = read_split(record).subjects, dataset.split.subjects
        moved = [s for s, side in before.items() if (side == TRAINING) != (now.get(s, side) == TRAINING)]
        if moved:
            raise UserError(
                f"{folder}: {len(moved)} subject(s) are on another side of {dataset.split.path} than when this run "
                f"began, e.g. {moved[0]}: begin another run (another --run-name), or bring back the split"
            )
    dataset.split.write(folder)
