"""How far a metric of sets of volumes may be off by the choice of the volumes. Pure functions of a seed."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

Statistic = Callable[..., float]  # of one index tensor per set
FEWEST = 3  # subjects, or pairs, of which resamples tell something: of two they are both, or one of them twice
TOO_FEW = "n too small"


def bootstrap_interval(
    statistic: Statistic, sizes: Sequence[int], *, num_resamples: int = 200, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval around a statistic of all volumes, from resamples of the volumes with replacement.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979). A resample repeats
    volumes, which raises every distance between sets. So the percentiles of the resamples are shifted by the value
    less the resamples' mean: the interval shows the spread at this number of volumes around the value reported, and
    no bias of the statistic itself. Few volumes show a little too little spread (an N where N − 1 is due).

    statistic: called with all indices in order first, then with resamples. Sets are resampled independently; one set
        is what volumes that belong in pairs take. sizes: number of volumes, or of whatever is drawn, of each set.
    num_resamples, confidence: the bounds are the percentiles 100·(1 ± confidence) / 2 of that many resamples.
    seed: the same one gives the same resamples; torch's own random state is neither used nor changed.
    Raises UserError for a set below 2 volumes, fewer than 2 resamples, a confidence outside (0, 1), and a statistic
    that is not finite for all volumes or for any resample: without those the interval would be too narrow.
    """
    _check(sizes, num_resamples, confidence)
    return _interval(_around_value(statistic, sizes, _with_replacement(seed), num_resamples, 1.0), confidence)


def share_interval(interval: tuple[float, float] | str, count: int) -> tuple[float, float] | str:
    """Interval of a share of `count` volumes that is 0 or 1 in all resamples: those tell nothing of the next volume.

    The exact 95 % interval in its place (Clopper and Pearson, Biometrika 26, 1934); any other one as it is.
    """
    if interval not in ((0.0, 0.0), (1.0, 1.0)):
        return interval
    lowest = 0.025 ** (1 / count)
    return (lowest, 1.0) if interval[0] else (0.0, 1 - lowest)


def subsampling_interval(
    statistic: Statistic, sizes: Sequence[int], *, num_resamples=200, seed=0, confidence=0.95, share=0.8, largest=1000
) -> tuple[float, float]:
    """As `bootstrap_interval`, from resamples without replacement: for distances between sets.

    "m out of n bootstrap" (Bickel et al., Statistica Sinica 7, 1997; Politis and Romano, Annals of Statistics 22,
    1994): m of the n volumes of each set, their spread times √(m / (n − m)). No volume is repeated, which nearest
    neighbours, kernels and covariances can't take: with 60 vectors of 30 features in each set, intervals with
    replacement are up to 3 times too wide for coverage and 2 times for the Fréchet distance, these 1.5 times for both
    (1.2 where sets differ).

    share: m / n, lower where a set has more than `largest` / share volumes.
    Raises UserError as `bootstrap_interval`, and for sets below 3 volumes.
    """
    _check(sizes, num_resamples, confidence, least=3)
    draw, scale = _without_replacement(sizes, seed, share, largest)
    return _interval(_around_value(statistic, sizes, draw, num_resamples, scale), confidence)


def _check(sizes: Sequence[int], num_resamples: int, confidence: float, least: int = 2) -> None:
    if not sizes or min(sizes) < least:
        raise UserError(f"an interval needs sets of at least {least} volumes, got {list(sizes)}")
    if num_resamples < 2:
        raise UserError(f"an interval needs at least 2 resamples, got {num_resamples}")
    if not 0 < confidence < 1:
        raise UserError(f"the confidence of an interval lies between 0 and 1, got {confidence}")


def bootstrap_spread(statistic: Statistic, sizes: Sequence[int], *, num_resamples=200, seed=0) -> np.ndarray:
    """(num_resamples,): the values that `bootstrap_interval` has its percentiles of, around that of all volumes.

    The same seed and sizes give the same resamples, so that values of two statistics belong together one by one.
    """
    _check(sizes, num_resamples, 0.5)
    return _around_value(statistic, sizes, _with_replacement(seed), num_resamples, 1.0)


def subsampling_spread(
    statistic: Statistic, sizes: Sequence[int], *, num_resamples=200, seed=0, share=0.8, largest=1000
) -> np.ndarray:
    """(num_resamples,): as `bootstrap_spread`, of `subsampling_interval`."""
    _check(sizes, num_resamples, 0.5, least=3)
    draw, scale = _without_replacement(sizes, seed, share, largest)
    return _around_value(statistic, sizes, draw, num_resamples, scale)


def _with_replacement(seed: int) -> Callable[[int], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda size: torch.randint(size, (size,), generator=generator)


def _without_replacement(
    sizes: Sequence[int], seed: int, share: float, largest: float
) -> tuple[Callable[[int], Tensor], float]:
    """A draw of some of a set, and what the spread of such draws is to be multiplied with."""
    generator = torch.Generator().manual_seed(seed)
    part = min(share, largest / max(sizes))
    drawn = {size: min(size - 1, max(1, round(part * size))) for size in sizes}
    total = sum(drawn[size] for size in sizes)
    scale = math.sqrt(total / (sum(sizes) - total))
    return lambda size: torch.randperm(size, generator=generator)[: drawn[size]], scale


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    # The usual percentiles lie between the resamples and are too narrow where these are few (94 % of 200 for 95 %).
    # Weibull's, p·(n + 1), hold one more resample with the probability asked for.
    lower, upper = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2], method="weibull").tolist()
    return lower, upper


def _around_value(
    statistic: Statistic, sizes: Sequence[int], draw: Callable, num_resamples: int, scale: float
) -> np.ndarray:
    """The resamples less their mean, times `scale`, around the value of all volumes."""
    value = statistic(*(torch.arange(size) for size in sizes))
    if not math.isfinite(value):
        raise UserError(f"an interval needs a finite statistic, got {value} for all volumes")
    resamples = np.array([statistic(*map(draw, sizes)) for _ in range(num_resamples)], dtype=np.float64)
    failed = num_resamples - int(np.isfinite(resamples).sum())
    if failed:
        raise UserError(
            f"the statistic is not finite for {failed} of {num_resamples} resamples of {list(sizes)} volumes, "
            "so no interval is defined: take more volumes"
        )
    return value + scale * (resamples - resamples.mean())


def random_halves(count: int, half: int, num: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """`num` times two disjoint random sets of volumes: what a distance between sets is where nothing differs.

    count: number of volumes; half: number in each of the two sets. The same seed gives the same sets.
    Yields two index tensors (half,). Raises UserError where the volumes don't suffice, before the first.
    """
    if half < 1 or 2 * half > count:
        raise UserError(f"two disjoint sets of {half} volumes each can't be drawn from {count}")
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randperm(count, generator=generator) for _ in range(num))
    return ((draw[:half], draw[half : 2 * half]) for draw in draws)
