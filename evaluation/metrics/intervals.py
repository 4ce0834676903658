"""How far a metric of sets of volumes may be off by the choice of the volumes. Pure functions of a seed."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from config.errors import UserError


def bootstrap_interval(
    statistic: Callable[..., float],
    sizes: Sequence[int],
    *,
    num_resamples: int = 200,
    seed: int = 0,
    confidence: float = 0.95,
    largest: int = 1000,
) -> tuple[float, float]:
    """Confidence interval around a statistic of all volumes, from resamples of the volumes with replacement.

    Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979). A resample repeats
    volumes, which raises every distance between sets. So the percentiles of the resamples are shifted by the value
    less the resamples' mean: the interval shows the spread at this number of volumes around the value reported, and
    no bias of the statistic itself. Few volumes show a little too little spread (an N where N − 1 is due).

    statistic: function of one index tensor per set; called with all indices in order first, then with resamples. Sets
        are resampled independently; one set is what volumes that belong in pairs take.
    sizes: number of volumes of each set.
    num_resamples, confidence: the bounds are the percentiles 100·(1 ± confidence) / 2 of that many resamples.
    largest: volumes of a set in a resample. Of larger sets, resamples are as many times smaller as this says, and their
        spread is scaled by the square root of that ("m out of n", Bickel et al., Statistica Sinica 7, 1997): 10,000
        volumes need no 200 times the work of the value itself.
    seed: the same one gives the same resamples; torch's own random state is neither used nor changed.
    Returns the lower and the upper bound.
    Raises UserError for a set below 2 volumes, fewer than 2 resamples, a confidence outside (0, 1), and a statistic
    that is not finite for all volumes or for any resample: without those the interval would be too narrow.
    """
    if not sizes or min(sizes) < 2:
        raise UserError(f"an interval needs sets of at least 2 volumes, got {list(sizes)}")
    if num_resamples < 2:
        raise UserError(f"an interval needs at least 2 resamples, got {num_resamples}")
    if not 0 < confidence < 1:
        raise UserError(f"the confidence of an interval lies between 0 and 1, got {confidence}")
    value = statistic(*(torch.arange(size) for size in sizes))
    if not math.isfinite(value):
        raise UserError(f"an interval needs a finite statistic, got {value} for all volumes")

    generator = torch.Generator().manual_seed(seed)
    share = min(1.0, largest / max(sizes))
    drawn = [max(2, round(share * size)) for size in sizes]
    resamples = np.array(
        [
            statistic(*(torch.randint(size, (n,), generator=generator) for size, n in zip(sizes, drawn, strict=True)))
            for _ in range(num_resamples)
        ],
        dtype=np.float64,
    )
    failed = num_resamples - int(np.isfinite(resamples).sum())
    if failed:
        raise UserError(
            f"the statistic is not finite for {failed} of {num_resamples} resamples of {list(sizes)} volumes, "
            "so no interval is defined: take more volumes"
        )
    # The usual percentiles lie between the resamples and are too narrow where these are few (94 % of 200 for 95 %).
    # Weibull's, p·(n + 1), hold one more resample with the probability asked for.
    bounds = np.quantile(resamples, [(1 - confidence) / 2, (1 + confidence) / 2], method="weibull")
    lower, upper = (value + math.sqrt(share) * (bounds - resamples.mean())).tolist()
    return lower, upper


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
