"""How each figure is to be read: which way is better, what "like real" means, between which bounds it lies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dataset.volumes.pictures import PLANES
from evaluation.results.results import Figure

Interval = tuple[float, float] | str  # low and high, or why there is none


@dataclass(frozen=True)
class Scale:
    """better: "lower", "higher" or "real", where too low is as bad as too high; like_real: what real volumes have."""

    better: str
    like_real: str = ""
    low: float = -math.inf
    high: float = math.inf


HIGHER, LOWER = Scale("higher"), Scale("lower")
SHARE = Scale("higher", low=0, high=1)
DISTANCE = Scale("lower", low=0)
CODES = Scale("higher", low=1)

SCALES = {
    # A reconstruction and its volume
    "PSNR": HIGHER,
    "PSNR, foreground": HIGHER,
    "L1": DISTANCE,
    "L1, foreground": DISTANCE,
    "SSIM": Scale("higher", low=-1, high=1),
    "MS-SSIM": SHARE,
    "LPIPS": DISTANCE,
    "seam index ratio": Scale("real", "ratio 1", low=0),
    "perplexity of a volume": CODES,
    "codebook usage": SHARE,
    "codebook perplexity": CODES,
    # Generated volumes and their truths
    "residual of the measurements": DISTANCE,
    "own truth is the nearest": SHARE,
    # Generated and real volumes
    "FID-3D": DISTANCE,
    "FID-2.5D": DISTANCE,
    **{f"FID-2.5D {plane}": DISTANCE for plane in PLANES},
    "MMD": LOWER,  # unbiased, so that it can be negative
    "precision": SHARE,
    "recall": SHARE,
    "density": Scale("real", "value 1", low=0),  # more where volumes crowd in the middle of the real ones
    "coverage": SHARE,
    "MS-SSIM of generated pairs": Scale("real", "that of real pairs", low=0, high=1),
    "MS-SSIM of real pairs": Scale("real", "what the generated are compared with", low=0, high=1),
    "diversity gap": Scale("real", "difference 0", low=-1, high=1),  # noise has no two volumes alike
    "nearer than held-out": Scale("real", "probability 0.5", low=0, high=1),
    "nearest distance ratio": Scale("real", "ratio 1", low=0),
    # Distances of validity, by what stands before the colon
    "FID of a half": DISTANCE,
    "FID to itself": DISTANCE,
}


def make_figure(
    group: str,
    metric: str,
    value: float,
    interval: Interval | None,
    num: Mapping[str, int],
    *,
    high: float | None = None,
    is_difference: bool = False,
    **more,
) -> Figure:
    """A figure that is read as `SCALES` says, its interval within the bounds.

    interval: a text says why there is none. high: bound of this figure, where that of its metric is higher.
    is_difference: of two values of the metric. more: other fields of `Figure`.
    """
    scale = SCALES[metric.split(":")[0]]
    reason = interval if isinstance(interval, str) else ""
    if isinstance(interval, tuple):
        low, high = scale.low, scale.high if high is None else high
        low, high = (low - high, high - low) if is_difference else (low, high)
        interval = max(low, interval[0]), min(high, interval[1])
    like_real = "" if is_difference else scale.like_real
    interval = None if reason else interval
    return Figure(group, metric, value, interval, num, scale.better, like_real=like_real, no_interval=reason, **more)
