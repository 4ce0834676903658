"""What a training loop costs between two logged steps: time, waiting for data, memory."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from common.memory import resident_memory_gb


class LoopMeter:
    """Speed, waiting for data and memory of a training loop, read at each logged step.

    The loop runs over `timed(batches)` and calls `count` in each step. Times are those of the wall: validation,
    checkpoints and whatever else the loop does count too. Nothing here makes a GPU wait but `read`.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin an interval now."""
        self._since = time.perf_counter()
        self._waited_s = 0.0
        self._steps = 0
        self._samples = 0
        self._began = _Moment()
        self._of_kinds: list[tuple[str, _Moment, float]] = []  # of each step: kind, its end, waited till then

    def timed(self, batches: Iterable) -> "TimedBatches":
        """The same batches; how long the loop waits for each is measured."""
        return TimedBatches(batches, self)

    def add_waiting(self, seconds: float) -> None:
        self._waited_s += seconds

    def count(self, samples: int, kind: str = "") -> None:
        """One step is done, of `samples` samples over all ranks. kind: speeds are told apart by it."""
        self._steps += 1
        self._samples += samples
        self._of_kinds.append((kind, _Moment(), self._waited_s))

    def read(self, device: torch.device, maximum: Callable[[Tensor], Tensor] = lambda values: values) -> dict:
        """The numbers of the interval that ends now; the next one begins.

        Args:
            device: where this rank trains.
            maximum: elementwise maximum of a tensor over the ranks; to be called on all ranks in the same step. In a
                synchronous step the rank that waits longest sets the pace, and the one that needs most memory fails.

        Returns:
            steps_per_s; samples_per_s, over all ranks; data_wait, the share of the time (0 to 1) in which the loop
            waited for its next batch, on a GPU only waits that outlasted its work; memory_gb, resident memory of the
            process, where the system tells it; on a GPU gpu_memory_gb, the most that was allocated at a time during
            the interval. GB are 10⁹ bytes. Where steps were of several kinds, steps_per_s/KIND and data_wait/KIND of
            each besides, as on this rank.
        """
        seconds = time.perf_counter() - self._since
        of_this_rank = {"data_wait": self._waited_s / seconds, "memory_gb": resident_memory_gb()}
        if device.type == "cuda":
            of_this_rank["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            torch.cuda.reset_peak_memory_stats(device)
        of_this_rank = {name: value for name, value in of_this_rank.items() if value is not None}
        of_all = maximum(torch.tensor(list(of_this_rank.values()), device=device)).tolist()
        rates = {"steps_per_s": self._steps / seconds, "samples_per_s": self._samples / seconds, **self._by_kind()}
        self.restart()
        return {**rates, **dict(zip(of_this_rank, of_all, strict=True))}

    def _by_kind(self) -> dict[str, float]:
        steps: dict[str, list[tuple[float, float]]] = {}
        last, waited_before = self._began, 0.0
        for kind, end, waited in self._of_kinds:
            steps.setdefault(kind, []).append((end.seconds_since(last), waited - waited_before))
            last, waited_before = end, waited
        if len(steps) < 2:
            return {}
        totals = {kind: (len(of), *map(sum, zip(*of, strict=True))) for kind, of in steps.items()}
        rates = {f"steps_per_s/{kind}": count / seconds for kind, (count, seconds, _) in totals.items()}
        return rates | {f"data_wait/{kind}": waited / seconds for kind, (_, seconds, waited) in totals.items()}


class _Moment:
    """Now: on a GPU when it has done what it was given so far, which the training doesn't wait for."""

    def __init__(self) -> None:
        self._event = work_given_to_gpu(timed=True)
        self._at = time.perf_counter()

    def seconds_since(self, before: "_Moment") -> float:
        if self._event is None or before._event is None:
            return self._at - before._at
        self._event.synchronize()
        return before._event.elapsed_time(self._event) / 1000


class TimedBatches:
    """An iterable of batches, e.g. a DataLoader, that tells a meter how long the loop waited for each of them."""

    def __init__(self, batches: Iterable, meter: LoopMeter) -> None:
        self.batches = batches
        self.meter = meter

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return _TimedIterator(iter(self.batches), self.meter)


class _TimedIterator:
    """No generator, which would keep each batch, and its memory, until the next one has come."""

    def __init__(self, iterator: Iterator, meter: LoopMeter) -> None:
        self.iterator = iterator
        self.meter = meter

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        began, work_before = time.perf_counter(), work_given_to_gpu()
        try:
            return next(self.iterator)
        finally:
            if work_before is None or work_before.query():  # else the GPU was busy all the while, and nothing is lost
                self.meter.add_waiting(time.perf_counter() - began)


def work_given_to_gpu(timed: bool = False) -> torch.cuda.Event | None:
    """An event that is over when the GPU has done all it was given so far; None without a GPU."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(enable_timing=timed)
    event.record()
    return event
