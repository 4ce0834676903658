"""What the parts of the benchmark share: timing ways in turn, peak memory, and the form of their results."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.precision import clock
from common.progress import Progress

Built = TypeVar("Built")
SLOW_PRODUCT_S = 0.01  # of 256³, 3 billion operations a second


@dataclass(frozen=True)
class Row:
    """One way of doing the work.

    seconds: of each repetition. count: units of work in a repetition, e.g. patches. peak_gb: memory beside what was
    there before, None where it isn't measured. difference: of the results from the baseline's, None likewise.
    limit_share: of what the hardware could do at most (`Limits`), 0 to 1, None where it isn't measured.
    """

    name: str
    seconds: list[float]
    count: int
    peak_gb: float | None = None
    difference: float | None = None
    limit_share: float | None = None

    @property
    def rate(self) -> float:
        """Units a second, by the median repetition."""
        return self.count / median(self.seconds)


@dataclass(frozen=True)
class Report:
    """Results of a part.

    unit: what `Row.count` counts. baseline: the row that ratios are taken to. notes: further figures for the JSON and
    for the lines below the table.
    """

    title: str
    unit: str
    baseline: str
    rows: list[Row]
    notes: dict[str, Any] = field(default_factory=dict)

    def ratio(self, row: Row) -> float:
        """How many times the baseline's rate a row has."""
        return row.rate / next(other.rate for other in self.rows if other.name == self.baseline)


def chosen(builders: Mapping[str, Callable[[], Built]], names: str | None, compiles: bool = False) -> dict[str, Built]:
    """The ways that are to be measured, built; the first is the one that the others are compared with.

    names: as `--ways` has them, with commas between; None: all, those that compile only if `compiles`. UserError for
    one that there isn't.
    """
    if names is None:
        wanted = [name for name in builders if compiles or "compile" not in name]
    else:
        wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in builders]:
        raise UserError(f"--ways: there is no {unknown[0]!r}: choose from {', '.join(builders)}")
    return {name: builders[name]() for name in wanted}


def fitting(measure: Callable[[int], Report], batch_size: int) -> Report:
    """What `measure` reports of this batch, or of half as much as often as memory is too little; the notes say so."""
    size = batch_size
    while True:
        try:
            report = measure(size)
            report.notes["batch size"] = size
            if size < batch_size:
                report.notes["does not fit, batch size"] = 2 * size
            return report
        except RuntimeError as error:
            if size == 1 or not _is_out_of_memory(error):
                raise
        gc.collect()  # outside: the error holds what its frames held
        torch.cuda.empty_cache()
        size //= 2


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Also as libraries that allocate on their own say it."""
    named = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in named)


def in_turn(ways: Mapping[str, Callable[[], float]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way, each called in turn `repetitions` times: what slows the machine down hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Progress("timing", repetitions * len(ways), "run", transient=True) as progress:
        for _ in range(repetitions):
            for name, way in ways.items():
                seconds[name].append(way())
                progress.advance()
    return seconds


def timed(way: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, until the device has done all of it."""
    begin = clock(device)
    way()
    return clock(device) - begin


def with_peak_memory(way: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float | None]:
    """A call's result, and the most memory in GB that it took beside what was taken before.

    On a GPU that of tensors; on a CPU that of the process, None where the system doesn't let it be measured.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = way()
        return result, (torch.cuda.max_memory_allocated(device) - before) / 1e9
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else memory that was freed before counts as taken
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return way(), None
    before = _status_bytes("VmRSS")
    result = way()
    return result, max(0, _status_bytes("VmHWM") - before) / 1e9


def compared(
    ways: Mapping[str, tuple[Callable, float]], device: torch.device, measure_difference: Callable | None = None
) -> Iterator[tuple[str, Tensor, float | None, float]]:
    """Calls each way once: its name, result, peak memory (`with_peak_memory`) and difference from the first one's.

    ways: each with its tolerance. measure_difference: of a result from the first; None: `largest_difference`.
    On a GPU float32 is exact here, as tolerances in float32 are narrower than the rounding of TF32.
    UserError for a difference above the tolerance.
    """
    expected = None
    for name, (way, tolerance) in ways.items():
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            found, peak_gb = with_peak_memory(way, device)
        expected = found if expected is None else expected
        difference = (measure_difference or largest_difference)(found, expected)
        if not difference <= tolerance:
            raise UserError(f"{name}: differs from the plain way by {difference:.2g}: nothing was timed")
        yield name, found, peak_gb, difference


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected: for gradients, whose largest values are few."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, in standard deviations of what is expected."""
    return ((found.float() - expected.float()).abs().max() / expected.float().std()).item()


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Limits:
    """What a device does at most: operations a second of a large product by type, and bytes a second of a copy."""

    products: dict[torch.dtype, float]
    copy: float

    @classmethod
    def measured(cls, device: torch.device, dtypes: Iterable[torch.dtype]) -> "Limits":
        return cls({dtype: matmul_rate(device, dtype) for dtype in sorted(set(dtypes), key=str)}, copy_rate(device))

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The least that work of so many operations takes that moves at least so many bytes."""
        return max(flops / self.products[dtype], num_bytes / self.copy)


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, repetitions: int = 3) -> float:
    """Floating point operations a second of a large matrix product, the best of a few: what a step can reach at most.

    On a GPU it is that of the matrix units, in float32 with TF32 where convolutions have it.
    """
    on_gpu = device.type == "cuda"
    product = Product(device, dtype, tf32=on_gpu and torch.backends.cudnn.allow_tf32)
    return product.flops / min(product.times(repetitions))


def copy_rate(device: torch.device, repetitions: int = 3) -> float:
    """Bytes a second, read and written, of a large copy within the device's memory, the best of a few."""
    copy = Copy(device)
    return copy.num_bytes / min(copy.times(repetitions))


class Product:
    """A large matrix product, to be timed. tf32: whether float32 on a GPU may be rounded to TF32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tf32: bool = False) -> None:
        edge = 8192 if device.type == "cuda" else 2048 if _is_fast(dtype) else 256
        self.device, self.tf32, self.flops = device, tf32, 2 * edge**3
        self._a = torch.randn(edge, edge, device=device, dtype=dtype)

    def times(self, repetitions: int) -> list[float]:
        """Seconds of each."""
        settings = torch.backends.cuda.matmul
        before = settings.allow_tf32, settings.fp32_precision
        try:
            settings.allow_tf32 = self.tf32
            return _warm_times(lambda: self._a @ self._a, self.device, repetitions)
        finally:  # the older name turns "none", torch's first state, into "ieee"
            settings.allow_tf32, settings.fp32_precision = before


def _is_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a type rather than emulating it, for minutes where the matrix is large."""
    a = torch.ones(256, 256, dtype=dtype)
    a @ a
    begin = time.perf_counter()
    a @ a
    return time.perf_counter() - begin < SLOW_PRODUCT_S


class Copy:
    """A large copy within a device's memory, to be timed. num_bytes: read and written."""

    def __init__(self, device: torch.device) -> None:
        num_elements = 2**28 if device.type == "cuda" else 2**24
        self.device = device
        self._from = torch.ones(num_elements, device=device)
        self._to = torch.empty_like(self._from)
        self.num_bytes = 2 * self._from.nbytes

    def times(self, repetitions: int) -> list[float]:
        """Seconds of each."""
        return _warm_times(lambda: self._to.copy_(self._from), self.device, repetitions)


def _warm_times(way: Callable[[], object], device: torch.device, repetitions: int) -> list[float]:
    for _ in range(10 if device.type == "cuda" else 1):  # libraries choose their kernels, and clocks rise
        way()
    return [timed(way, device) for _ in range(repetitions)]


def count_flops(way: Callable[[], object]) -> int:
    """Floating point operations of a call: those of its matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


def kept_gb(way: Callable[[], object], weights: Iterable[Tensor]) -> float:
    """Memory in GB that a call's forward passes keep for their backward passes, each piece of memory counted once.

    The weights themselves don't count, and neither does what recomputation keeps only while it runs.
    """
    pieces: dict[int, int] = {}
    kept: list[Tensor] = []  # or the place of one could be given to another

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        pieces[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        way()
    for weight in weights:
        pieces.pop(weight.untyped_storage().data_ptr(), None)
    return sum(pieces.values()) / 1e9
