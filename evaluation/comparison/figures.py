"""From features of real, generated and training volumes to figures with N, interval and floor. No files here."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from omegaconf import DictConfig
from torch import Tensor

from evaluation.comparison.pairs import PairScores
from evaluation.metrics.distances import frechet_distance, median_bandwidth, mmd_from_kernels, nearest, rbf_kernel
from evaluation.metrics.intervals import (
    FEWEST,
    TOO_FEW,
    interval_of_enough,
    joined,
    random_halves,
    share_interval,
    subsampling_interval,
)
from evaluation.metrics.manifolds import precision_recall_density_coverage
from evaluation.results.results import Figure, Floor
from evaluation.results.scales import Interval, make_figure

SLICES = "slices of each"
MOST_VECTORS = 2000  # of a set in a resample, so that intervals of 10,000 volumes take minutes
FEWEST_VOLUMES = 100  # of a class, whatever their slices
MANIFOLD_METRICS = ("precision", "recall", "density", "coverage")

Indices = Tensor  # (n,) which volumes of a set
Statistic = Callable[[Indices, Indices], float]  # of some real and some generated volumes


@dataclass(frozen=True)
class Sampling:
    """How intervals and floors are drawn."""

    num_resamples: int
    num_halvings: int
    seed: int

    @classmethod
    def of(cls, cfg: DictConfig) -> "Sampling":
        return cls(cfg.num_resamples, cfg.num_halvings, cfg.seed)


@dataclass(frozen=True)
class Memorisation:
    """Distances to the nearest training volume. nearest: its index for each generated volume, (M,)."""

    generated: Tensor  # (M,)
    held_out: Tensor  # (N,)
    nearest: Tensor  # (M,)


@dataclass(frozen=True)
class Strata:
    """How many real and generated volumes each class has, in the order in which the sets hold them.

    Resamples and halvings keep these numbers: a set of two classes would else differ most by how many it has of each.
    """

    real: tuple[int, ...]
    generated: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, int]:
        return sum(self.real), sum(self.generated)

    @property
    def halves(self) -> tuple[int, ...]:
        """Of each class the largest number that two real halves and a part of the generated volumes can have."""
        return tuple(min(real // 2, generated) for real, generated in zip(self.real, self.generated, strict=True))


def distance_figures(
    group: str, network: str, real: dict[str, Tensor], generated: dict[str, Tensor], strata: Strata, sampling: Sampling
) -> list[Figure]:
    """FID, and MMD where there are features of whole volumes. real, generated: {plane: (N, S, F)}."""
    planes = list(real)
    memory: dict[tuple, float] = {}  # the mean over planes asks for the same resamples as each plane does

    def frechet(plane: str, of_real: Indices, of_generated: Indices, other: dict[str, Tensor]) -> float:
        key = (plane, other is real, of_real.numpy().tobytes(), of_generated.numpy().tobytes())
        if key not in memory:
            memory[key] = frechet_distance(real[plane][of_real].flatten(0, 1), other[plane][of_generated].flatten(0, 1))
        return memory[key]

    def mean_frechet(of_planes: Sequence[str], other: dict[str, Tensor]) -> Statistic:
        return lambda a, b: fmean(frechet(plane, a, b, other) for plane in of_planes)

    is_volume = len(planes) == 1
    asked = {"FID-3D": planes} if is_volume else {"FID-2.5D": planes, **{f"FID-2.5D {p}": [p] for p in planes}}
    figures = []
    for metric, of_planes in asked.items():
        statistics = mean_frechet(of_planes, generated), mean_frechet(of_planes, real)
        more = {} if is_volume else {SLICES: sum(real[plane].shape[1] for plane in of_planes)}
        figures.append(_distance(group, metric, network, statistics, more, strata, sampling))
    if is_volume:
        statistics = mmd_statistics(*(features[planes[0]][:, 0] for features in (real, generated)))
        figures.append(_distance(group, "MMD", network, statistics, {}, strata, sampling))
    return figures


def mmd_statistics(x: Tensor, y: Tensor) -> tuple[Statistic, Statistic]:
    """Unbiased MMD of some of x (real, (N, F)) with some of y (M, F), and with some of x; one kernel for all."""
    bandwidth = median_bandwidth(*x.tensor_split(2))  # pools both: every pair of real volumes, once
    kernel_xx, kernel_yy, kernel_xy = (rbf_kernel(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))

    def with_generated(a: Indices, b: Indices) -> float:
        return mmd_from_kernels(kernel_xx[a][:, a], kernel_yy[b][:, b], kernel_xy[a][:, b])

    def with_real(a: Indices, b: Indices) -> float:
        return mmd_from_kernels(kernel_xx[a][:, a], kernel_xx[b][:, b], kernel_xx[a][:, b])

    return with_generated, with_real


def manifold_figures(
    group: str, network: str, real: Tensor, generated: Tensor, neighbours: int, strata: Strata, sampling: Sampling
) -> list[Figure]:
    """Precision, recall, density and coverage of features (N, F), (M, F)."""
    memory: dict[tuple, dict[str, float]] = {}  # the four metrics ask for the same resamples

    def measure(metric: str, a: Indices, b: Indices) -> float:
        key = (a.numpy().tobytes(), b.numpy().tobytes())
        if key not in memory:
            found = precision_recall_density_coverage(real[a], generated[b], neighbours)
            memory[key] = {name: values.mean().item() for name, values in found.items()}
        return memory[key][metric]

    counts = {"real": len(real), "generated": len(generated), "neighbours": neighbours}
    floors = _manifold_floors(real, generated, neighbours, strata, sampling)
    figures = []
    for metric in MANIFOLD_METRICS:
        value = measure(metric, *map(torch.arange, strata.totals))
        interval = _set_interval(partial(measure, metric), strata, sampling, least=neighbours + 1)
        if metric != "density":
            interval = share_interval(interval, counts["generated" if metric == "precision" else "real"])
        floor = floors.get(metric)
        figures.append(make_figure(group, metric, value, interval, counts, network=network, floor=floor))
    return figures


def diversity_figures(group: str, real: PairScores, generated: PairScores, sampling: Sampling) -> list[Figure]:
    """MS-SSIM of pairs of each set, and the gap; intervals over pairs, or over the volumes that pairs share."""
    figures = []
    for role, found in (("generated", generated), ("real", real)):
        num = {role: found.count, "pairs": len(found.pairs)}
        interval = _pairs_interval(found.mean_of, [found], sampling)
        figures.append(make_figure(group, f"MS-SSIM of {role} pairs", found.scores.mean().item(), interval, num))
    gap = figures[0].value - figures[1].value
    interval = _pairs_interval(lambda a, b: generated.mean_of(a) - real.mean_of(b), [generated, real], sampling)
    num = {"generated": generated.count, "real": real.count}
    return [*figures, make_figure(group, "diversity gap", gap, interval, num)]


def median(values: Tensor) -> float:
    """The mean of the middle two of an even number; torch's median is the lower one."""
    return values.double().quantile(0.5).item()


def memorisation_of(real: Tensor, generated: Tensor, training: Tensor) -> Memorisation:
    """Nearest training volumes by features (N, F), (M, F), (T, F)."""
    of_generated, index = nearest(generated, training)
    return Memorisation(of_generated, nearest(real, training)[0], index)


def memorisation_figures(
    group: str, network: str, found: Memorisation, num_training: int, sampling: Sampling
) -> list[Figure]:
    """How much nearer generated volumes lie to training volumes than real ones do that were not trained on."""
    sizes = [len(found.generated), len(found.held_out)]

    def nearer(a: Indices, b: Indices) -> float:
        difference = found.generated[a][:, None] - found.held_out[b][None]  # (M, N)
        return ((difference < 0).double() + 0.5 * (difference == 0).double()).mean().item()

    def ratio(a: Indices, b: Indices) -> float:
        return median(found.generated[a]) / median(found.held_out[b])

    num = {"generated": sizes[0], "real": sizes[1], "training": num_training}
    figures = []
    for metric, statistic in (("nearer than held-out", nearer), ("nearest distance ratio", ratio)):
        value, interval = float("nan"), None  # no ratio to a real volume that is a training volume
        if statistic is nearer or found.held_out.min() > 0:
            value, interval = statistic(*map(torch.arange, sizes)), _interval(statistic, sizes, sampling)
        if statistic is nearer:
            interval = share_interval(interval, min(sizes))
        figures.append(make_figure(group, metric, value, interval, num, network=network))
    return figures


# ------------------------------------------------------------------------------------------------- intervals and floors


def _interval(statistic: Callable[..., float], sizes: Sequence[int], sampling: Sampling) -> Interval:
    return interval_of_enough(statistic, sizes, num_resamples=sampling.num_resamples, seed=sampling.seed)


def _pairs_interval(statistic: Callable[..., float], sets: Sequence[PairScores], sampling: Sampling) -> Interval:
    if min(len(found.pairs) for found in sets) < FEWEST:  # of however many volumes
        return TOO_FEW
    return _interval(statistic, [found.num_units for found in sets], sampling)


def _set_interval(
    statistic: Statistic, strata: Strata, sampling: Sampling, least: int, num_slices: int = 1
) -> Interval:
    """Interval of a statistic of two sets, by resamples within each class of at most MOST_VECTORS vectors or so.

    There is none where a class has fewer than three volumes, or a resample fewer than `least`.
    """
    sizes = [*strata.real, *strata.generated]
    num_classes = len(strata.real)
    if min(sizes) < FEWEST:
        return TOO_FEW
    smallest = []

    def of_resample(*chosen: Indices) -> float:
        a = joined(chosen[:num_classes], strata.real)
        b = joined(chosen[num_classes:], strata.generated)
        smallest.append(min(len(a), len(b)))
        return statistic(a, b) if smallest[-1] >= least else 0.0

    largest = max(FEWEST_VOLUMES, MOST_VECTORS // num_slices)
    options = {"num_resamples": sampling.num_resamples, "seed": sampling.seed, "largest": largest}
    interval = subsampling_interval(of_resample, sizes, **options)
    return interval if min(smallest) >= least else TOO_FEW


def _distance(
    group: str, metric: str, network: str, statistics: tuple, more: dict[str, int], strata: Strata, sampling: Sampling
) -> Figure:
    """A distance with interval and floor. statistics: of real with generated volumes, and of real with real ones."""
    statistic, of_real = statistics
    floor = None  # where the real set is too small to be halved
    if sum(strata.halves) >= 2:
        drawn = list(_halvings(strata, sampling))
        values = fmean(of_real(a, b) for a, b, _ in drawn), fmean(statistic(b, part) for _, b, part in drawn)
        floor = Floor(*values, len(drawn[0][0]))
    interval = _set_interval(statistic, strata, sampling, least=2, num_slices=more.get(SLICES, 1))
    value = statistic(*map(torch.arange, strata.totals))
    num = {"real": strata.totals[0], "generated": strata.totals[1], **more}
    return make_figure(group, metric, value, interval, num, network=network, floor=floor)


def _halvings(strata: Strata, sampling: Sampling) -> Iterator[tuple[Indices, Indices, Indices]]:
    """Two disjoint parts of the real set and a part of the generated one, all of one size, `num_halvings` times."""
    empty = torch.arange(0)
    of_classes = []
    for real, generated, half in zip(strata.real, strata.generated, strata.halves, strict=True):
        if half == 0:
            of_classes.append([(empty, empty, empty)] * sampling.num_halvings)
            continue
        pairs = random_halves(real, half, sampling.num_halvings, sampling.seed)
        generator = torch.Generator().manual_seed(sampling.seed)
        of_classes.append([(*pair, torch.randperm(generated, generator=generator)[:half]) for pair in pairs])
    for drawn in zip(*of_classes, strict=True):
        first, second, part = zip(*drawn, strict=True)
        yield joined(first, strata.real), joined(second, strata.real), joined(part, strata.generated)


def _manifold_floors(real: Tensor, generated: Tensor, neighbours: int, strata: Strata, sampling: Sampling) -> dict:
    """Floors by metric; none where halves of the real set are too small for this many neighbours."""
    half = sum(strata.halves)
    if half <= neighbours:
        return {}
    found = [
        [precision_recall_density_coverage(real[b], x, neighbours) for x in (real[a], generated[part])]
        for a, b, part in _halvings(strata, sampling)
    ]
    return {
        metric: Floor(*(fmean(pair[i][metric].mean().item() for pair in found) for i in (0, 1)), half)
        for metric in found[0][0]
    }
