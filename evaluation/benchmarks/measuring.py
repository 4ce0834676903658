"""What the parts of the benchmark share: timing ways in turn, peak memory, and the form of their results."""

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.precision import clock
from common.progress import Progress


@dataclass(frozen=True)
class Row:
    """One way of doing the work.

    seconds: of each repetition. count: units of work in a repetition, e.g. patches. peak_gb: memory beside what was
    there before, None where it isn't measured. difference: of the results from the baseline's, None likewise.
    limit_share: of the rate of a large matrix product in the same type, 0 to 1, None where it isn't measured.
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
    UserError for a difference above the tolerance.
    """
    expected = None
    for name, (way, tolerance) in ways.items():
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


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, repetitions: int = 3) -> float:
    """Floating point operations a second of a large matrix product, the best of a few: what a step can reach at most.

    On a GPU it is that of the matrix units, in float32 as torch is set (TF32 or not).
    """
    edge = 8192 if device.type == "cuda" else 2048
    a = torch.randn(edge, edge, device=device, dtype=dtype)
    a @ a  # libraries choose their kernels at the first call
    return 2 * edge**3 / min(timed(lambda: a @ a, device) for _ in range(repetitions))


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
