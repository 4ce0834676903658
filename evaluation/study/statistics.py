"""Whether a variant differs from another one, by the figures of its runs. Pure functions.

A figure of a variant is the mean over its seeds. What it would be with other seeds and other volumes:

* seeds: weights, order and noise of the training and the volumes that are generated differ from seed to seed.
  Student's t of the runs; of a difference Welch's (Biometrika 34, 1947), which needs no equal spreads. Where the runs
  happen to be more alike than the generated volumes of one run let them be (shares of few volumes), these count.
* held-out volumes: all runs are compared with the same ones, so that these don't cancel by more seeds. Their spread is
  that of the mean, or of the difference, over resamples which are the same for all runs.

Both are independent: half the width of the interval is the root of the sum of their squares. Of one seed nothing is
known of others: the interval is that of the volumes alone, real and generated, and nothing is called better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

DIGITS = 8  # of resamples in JSON
NORMAL = 1.959964  # standard deviations of 95 %
BETTER, WORSE, UNDECIDED = "better", "worse", "–"


@dataclass(frozen=True)
class Measured:
    """A figure of one run. held_out, generated: its values were other such volumes drawn, one per resample."""

    value: float
    held_out: np.ndarray  # (R,)
    generated: np.ndarray | None = None  # (R,); None: nothing is generated

    def distance_to(self, target: float) -> "Measured":
        """How far it is from a value that is neither to be exceeded nor to be missed."""
        generated = None if self.generated is None else np.abs(self.generated - target)
        return Measured(abs(self.value - target), np.abs(self.held_out - target), generated)


@dataclass(frozen=True)
class Estimate:
    """value ± half, 95 %."""

    value: float
    half: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.value - self.half, self.value + self.half

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0."""
        low, high = self.interval
        return int(low > 0) - int(high < 0)


def estimate(runs: Sequence[Measured]) -> Estimate:
    """The mean of runs of different seeds."""
    return _estimate([runs], [1.0])


def difference(runs: Sequence[Measured], baseline: Sequence[Measured]) -> Estimate:
    """The mean of runs less that of the baseline's."""
    return _estimate([runs, baseline], [1.0, -1.0])


def verdict(better: str, target: float | None, runs: Sequence[Measured], baseline: Sequence[Measured]) -> str:
    """What a difference says. better: "lower", "higher", or "real": the nearer to `target`."""
    if min(len(runs), len(baseline)) < 2:
        return UNDECIDED
    sign = judged_difference(better, target, runs, baseline).sign
    good = 1 if better == "higher" else -1
    return {good: BETTER, -good: WORSE, 0: UNDECIDED}[sign]


def judged_difference(
    better: str, target: float | None, runs: Sequence[Measured], baseline: Sequence[Measured]
) -> Estimate:
    """The difference that a verdict goes by: of the values, or of their distances to the target."""
    if better == "real":
        runs, baseline = ([run.distance_to(target) for run in of] for of in (runs, baseline))
    return difference(runs, baseline)


def _estimate(groups: Sequence[Sequence[Measured]], signs: Sequence[float]) -> Estimate:
    """The sum of the groups' means with these signs."""
    value = sum(sign * np.mean([run.value for run in runs]) for sign, runs in zip(signs, groups, strict=True))
    held_out = sum(
        sign * np.mean([run.held_out for run in runs], axis=0) for sign, runs in zip(signs, groups, strict=True)
    )  # (R,)
    halves = [NORMAL * np.std(held_out, ddof=1), max(_seeds_half(groups), _generated_half(groups))]
    return Estimate(float(value), math.hypot(*halves))


def _seeds_half(groups: Sequence[Sequence[Measured]]) -> float:
    """Student's or Welch's; 0 where a group has one run only."""
    counts = [len(runs) for runs in groups]
    if min(counts) < 2:
        return 0.0
    parts = [np.var([run.value for run in runs], ddof=1) / len(runs) for runs in groups]  # of each mean
    total = sum(parts)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(part**2 / (count - 1) for part, count in zip(parts, counts, strict=True))
    return float(student.ppf(0.975, freedom) * math.sqrt(total))


def _generated_half(groups: Sequence[Sequence[Measured]]) -> float:
    spreads = [
        np.mean([np.var(run.generated, ddof=1) for run in runs]) / len(runs)
        for runs in groups
        if runs[0].generated is not None
    ]
    return NORMAL * math.sqrt(sum(spreads))


# ------------------------------------------------------------------------------------------------------------- as JSON


def to_record(figures: Mapping[str, Measured]) -> dict[str, dict]:
    """Figures by name as JSON holds them."""

    def numbers(values: np.ndarray | None) -> list[float] | None:
        return None if values is None else [float(f"{value:.{DIGITS}g}") for value in values]

    return {
        name: {"value": one.value, "held_out": numbers(one.held_out), "generated": numbers(one.generated)}
        for name, one in figures.items()
    }


def to_figures(record: Mapping[str, dict]) -> dict[str, Measured]:
    """What `to_record` was given."""

    def array(values: list[float] | None) -> np.ndarray | None:
        return None if values is None else np.array(values)

    return {
        name: Measured(one["value"], array(one["held_out"]), array(one["generated"])) for name, one in record.items()
    }
