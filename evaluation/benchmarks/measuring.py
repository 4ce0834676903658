"""What the parts of the benchmark share: timing ways in turn, and the form of their results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Row:
    """One way of doing the work.

    seconds: of each repetition. count: units of work in a repetition, e.g. patches.
    """

    name: str
    seconds: list[float]
    count: int

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
    for _ in range(repetitions):
        for name, way in ways.items():
            seconds[name].append(way())
    return seconds
