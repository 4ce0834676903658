"""Which bucket each training step takes, and which of its samples.

A bucket is all samples of one size; a batch has samples of one bucket. Everything depends on (seed, epoch) alone: it is
the same on all ranks, and an interrupted epoch can go on exactly.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from dataset.order.epochs import ORDER_STREAM, generator_of

TURNS, PROPORTIONAL = BUCKET_ORDERS = ("turns", "proportional")


class BucketOrder:
    """The batches of each epoch.

    `turns`: the buckets take turns, and a smaller one starts again from a new shuffle until the largest is through.
    `proportional`: in an epoch each bucket has as many steps as it has batches, and these are shuffled. A temperature
    above 1 evens that out: the steps of an epoch are shared out by batches^(1/temperature).

    Args:
        buckets: of each bucket the indices of its samples in the data set.
        batch_sizes: of each bucket, over all ranks; at most its samples.
        order: one of `BUCKET_ORDERS`.
        weights: how often each sample of the data set is taken beside those of weight 1; None: all alike, each once
            before any comes again.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        batch_sizes: Sequence[int],
        seed: int,
        order: str = TURNS,
        temperature: float = 1.0,
        weights: Sequence[float] | None = None,
    ) -> None:
        if any(len(samples) < size for samples, size in zip(buckets, batch_sizes, strict=True)):
            raise ValueError("a bucket has fewer samples than a batch")
        self.buckets = [np.asarray(samples) for samples in buckets]
        self.batch_sizes = list(batch_sizes)
        self.seed, self.order = seed, order
        self.weights = None if weights is None else np.asarray(weights, dtype=float)
        self._batches = np.array([len(b) // size for b, size in zip(self.buckets, self.batch_sizes, strict=True)])
        self._steps = self._steps_of_buckets(temperature)

    @property
    def steps_per_epoch(self) -> int:
        return int(self._steps.sum())

    @cached_property
    def samples_per_epoch(self) -> int:
        """Over all ranks."""
        return int(self._steps @ np.array(self.batch_sizes))

    def steps_done(self, epoch: int, samples_seen: int) -> int:
        """How many steps of the epoch its first `samples_seen` samples were, rounded down to whole steps."""
        ends = np.cumsum(np.array(self.batch_sizes)[self._turns(epoch)])
        return int(np.searchsorted(ends, samples_seen, side="right"))

    def samples_of(self, epoch: int, steps: int) -> int:
        """Samples, over all ranks, of the first `steps` steps of the epoch."""
        return int(np.array(self.batch_sizes)[self._turns(epoch)[:steps]].sum())

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[int]]]:
        """Bucket and samples, over all ranks, of each step of the epoch from `first_step` on."""
        visits = np.zeros(len(self.buckets), dtype=int)
        shuffles: dict[int, tuple[int, np.ndarray]] = {}  # of each bucket the pass that it is in, shuffled
        for step, bucket in enumerate(self._turns(epoch).tolist()):
            turn, place = divmod(int(visits[bucket]), int(self._batches[bucket]))
            visits[bucket] += 1
            if step < first_step:
                continue
            if shuffles.get(bucket, (None,))[0] != turn:
                shuffles[bucket] = turn, self._shuffled(epoch, bucket, turn)
            size = self.batch_sizes[bucket]
            yield bucket, shuffles[bucket][1][place * size : (place + 1) * size].tolist()

    def _steps_of_buckets(self, temperature: float) -> np.ndarray:
        """In an epoch."""
        if self.order == TURNS:
            return np.full(len(self.buckets), self._batches.max())
        shares = self._batches ** (1 / temperature)
        exact = self._batches.sum() * shares / shares.sum()
        steps = np.maximum(np.floor(exact).astype(int), 1)
        for bucket in np.argsort(steps - exact, kind="stable")[: max(0, self._batches.sum() - steps.sum())]:
            steps[bucket] += 1  # what rounding down left, to those that lost most by it
        return steps

    def _turns(self, epoch: int) -> np.ndarray:
        """The bucket of each step of the epoch."""
        buckets = np.arange(len(self.buckets))
        if self.order == TURNS:
            return np.tile(buckets, int(self._steps[0]))
        return generator_of(ORDER_STREAM, self.seed, epoch).permutation(np.repeat(buckets, self._steps))

    def _shuffled(self, epoch: int, bucket: int, turn: int) -> np.ndarray:
        """The bucket's samples in the order of its `turn`-th pass in the epoch."""
        # A lone bucket has the order of `EpochSampler`.
        place = (bucket, turn) if len(self.buckets) > 1 else ()
        rng = generator_of(ORDER_STREAM, self.seed, epoch, *place)
        samples = self.buckets[bucket]
        if self.weights is not None:
            ends = np.cumsum(self.weights[samples])
            # Evenly spaced marks from a random start: each sample as often as its weight says, to within one.
            marks = (rng.random() + np.arange(len(samples))) * ends[-1] / len(samples)
            samples = samples[np.minimum(np.searchsorted(ends, marks, side="right"), len(samples) - 1)]
        return rng.permutation(samples)
