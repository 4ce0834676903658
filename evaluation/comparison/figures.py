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
from evaluation.metrics.intervals import FEWEST, TOO_FEW, share_interval, subsampling_interval
from evaluation.metrics.manifolds import precision_recall_density_coverage
from evaluation.metrics.units import Units, by_subject, interval_of_enough
from evaluation.results.results import Figure, Floor
from evaluation.results.scales import Interval, make_figure

SLICES = "slices of each"
MOST_VECTORS = 2000  # of a set in a resample, so that intervals of 10,000 volumes take minutes
FEWEST_VOLUMES = 100  # of a class, whatever their slices
MANIFOLD_METRICS = ("precision", "recall", "density", "coverage")

Indices = Tensor  # (n,) which volumes of a set
Statistic = Callable[[Indices, Indices], float]  # of some real and some generated volumes
UnitsOfBoth = tuple[Units, Units]  # of the real and of the generated volumes


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
    units: UnitsOfBoth  # of the held-out and of the generated volumes


def distance_figures(
    group: str,
    network: str,
    real: dict[str, Tensor],
    generated: dict[str, Tensor],
    units: UnitsOfBoth,
    sampling: Sampling,
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
        figures.append(_distance(group, metric, network, statistics, more, units, sampling))
    if is_volume:
        statistics = mmd_statistics(*(features[planes[0]][:, 0] for features in (real, generated)), units)
        figures.append(_distance(group, "MMD", network, statistics, {}, units, sampling))
    return figures


def mmd_statistics(x: Tensor, y: Tensor, units: UnitsOfBoth) -> tuple[Statistic, Statistic]:
    """Unbiased MMD of some of x (real, (N, F)) with some of y (M, F), and with some of x; one kernel for all."""
    of_x, of_y = (of.shared for of in units)
    bandwidth = median_bandwidth(*x.tensor_split(2))  # pools both: every pair of real volumes, once
    kernel_xx, kernel_yy, kernel_xy = (rbf_kernel(a, b, bandwidth) for a, b in ((x, x), (y, y), (x, y)))

    def with_generated(a: Indices, b: Indices) -> float:
        return mmd_from_kernels(
            kernel_xx[a][:, a], kernel_yy[b][:, b], kernel_xy[a][:, b], subjects=(_some(of_x, a), _some(of_y, b))
        )

    def with_real(a: Indices, b: Indices) -> float:
        return mmd_from_kernels(
            kernel_xx[a][:, a], kernel_xx[b][:, b], kernel_xx[a][:, b], subjects=(_some(of_x, a), _some(of_x, b))
        )

    return with_generated, with_real


def _some(subjects: Tensor | None, chosen: Indices) -> Tensor | None:
    return None if subjects is None else subjects[chosen]


def manifold_figures(
    group: str, network: str, real: Tensor, generated: Tensor, neighbours: int, units: UnitsOfBoth, sampling: Sampling
) -> list[Figure]:
    """Precision, recall, density and coverage of features (N, F), (M, F)."""
    memory: dict[tuple, dict[str, float]] = {}  # the four metrics ask for the same resamples

    def measure(metric: str, a: Indices, b: Indices) -> float:
        key = (a.numpy().tobytes(), b.numpy().tobytes())
        if key not in memory:
            subjects = tuple(_some(of.shared, chosen) for of, chosen in zip(units, (a, b), strict=True))
            found = precision_recall_density_coverage(real[a], generated[b], neighbours, subjects)
            memory[key] = {name: values.mean().item() for name, values in found.items()}
        return memory[key][metric]

    num = {**_count(units), "neighbours": neighbours}
    floors = _manifold_floors(real, generated, neighbours, units, sampling)
    figures = []
    for metric in MANIFOLD_METRICS:
        value = measure(metric, *map(torch.arange, map(len, units)))
        interval = _set_interval(partial(measure, metric), units, sampling, least=neighbours + 1)
        if metric != "density":
            interval = share_interval(interval, units[metric == "precision"].num_subjects)
        floor = floors.get(metric)
        figures.append(make_figure(group, metric, value, interval, num, network=network, floor=floor))
    return figures


def diversity_figures(group: str, real: PairScores, generated: PairScores, sampling: Sampling) -> list[Figure]:
    """MS-SSIM of pairs of each set, and the gap; intervals over pairs, or over the subjects that pairs share."""
    figures = []
    for role, found in (("generated", generated), ("real", real)):
        num = {**found.units.count(role), "pairs": len(found.pairs)}
        interval = _pairs_interval(found.mean_of, [found], sampling)
        figures.append(make_figure(group, f"MS-SSIM of {role} pairs", found.scores.mean().item(), interval, num))
    gap = figures[0].value - figures[1].value
    interval = _pairs_interval(lambda a, b: generated.mean_of(a) - real.mean_of(b), [generated, real], sampling)
    num = {**generated.units.count("generated"), **real.units.count("real")}
    return [*figures, make_figure(group, "diversity gap", gap, interval, num)]


def median(values: Tensor) -> float:
    """The mean of the middle two of an even number; torch's median is the lower one."""
    return values.double().quantile(0.5).item()


def memorisation_of(real: Tensor, generated: Tensor, training: Tensor, units: UnitsOfBoth) -> Memorisation:
    """Nearest training volumes by features (N, F), (M, F), (T, F)."""
    of_generated, index = nearest(generated, training)
    return Memorisation(of_generated, nearest(real, training)[0], index, units)


def memorisation_figures(
    group: str, network: str, found: Memorisation, num_training: int, sampling: Sampling
) -> list[Figure]:
    """How much nearer generated volumes lie to training volumes than real ones do that were not trained on."""
    held_out, generated = found.units
    sets = [generated, held_out]

    def nearer(a: Indices, b: Indices) -> float:
        difference = found.generated[a][:, None] - found.held_out[b][None]  # (M, N)
        return ((difference < 0).double() + 0.5 * (difference == 0).double()).mean().item()

    def ratio(a: Indices, b: Indices) -> float:
        return median(found.generated[a]) / median(found.held_out[b])

    num = {**generated.count("generated"), **held_out.count("real"), "training": num_training}
    figures = []
    for metric, statistic in (("nearer than held-out", nearer), ("nearest distance ratio", ratio)):
        value, interval = float("nan"), None  # no ratio to a real volume that is a training volume
        if statistic is nearer or found.held_out.min() > 0:
            value, interval = statistic(*map(torch.arange, map(len, sets))), _interval(statistic, sets, sampling)
        if statistic is nearer:
            interval = share_interval(interval, min(units.num_subjects for units in sets))
        figures.append(make_figure(group, metric, value, interval, num, network=network))
    return figures


# ------------------------------------------------------------------------------------------------- intervals and floors


def _interval(statistic: Callable[..., float], sets: Sequence[Units], sampling: Sampling) -> Interval:
    return interval_of_enough(statistic, sets, num_resamples=sampling.num_resamples, seed=sampling.seed)


def _pairs_interval(statistic: Callable[..., float], sets: Sequence[PairScores], sampling: Sampling) -> Interval:
    if min(len(found.pairs) for found in sets) < FEWEST:  # of however many subjects
        return TOO_FEW
    return _interval(statistic, [Units.own(found.num_units) for found in sets], sampling)


def _set_interval(
    statistic: Statistic, units: UnitsOfBoth, sampling: Sampling, least: int, num_slices: int = 1
) -> Interval:
    """Interval of a statistic of two sets, by resamples within each class of at most MOST_VECTORS vectors or so.

    There is none where a class has fewer than three subjects, or a resample fewer than `least` volumes.
    """
    if min(of.fewest for of in units) < FEWEST:
        return TOO_FEW
    smallest = []

    def of_resample(a: Indices, b: Indices) -> float:
        smallest.append(min(len(a), len(b)))
        return statistic(a, b) if smallest[-1] >= least else 0.0

    of_subjects, sizes = by_subject(of_resample, units)
    most_volumes = max(sum(map(len, stratum)) for of in units for stratum in of.strata)
    largest = max(FEWEST_VOLUMES, MOST_VECTORS // num_slices) * max(sizes) / most_volumes  # in subjects
    options = {"num_resamples": sampling.num_resamples, "seed": sampling.seed, "largest": largest}
    interval = subsampling_interval(of_subjects, sizes, **options)
    return interval if min(smallest) >= least else TOO_FEW


def _distance(
    group: str,
    metric: str,
    network: str,
    statistics: tuple,
    more: dict[str, int],
    units: UnitsOfBoth,
    sampling: Sampling,
) -> Figure:
    """A distance with interval and floor. statistics: of real with generated volumes, and of real with real ones."""
    statistic, of_real = statistics
    floor, drawn = None, list(_halvings(units, sampling))
    if drawn and len(drawn[0][0]) >= 2:  # a real set can be too small to be halved
        values = fmean(of_real(a, b) for a, b, _ in drawn), fmean(statistic(b, part) for _, b, part in drawn)
        floor = Floor(*values, len(drawn[0][0]))
    interval = _set_interval(statistic, units, sampling, least=2, num_slices=more.get(SLICES, 1))
    value = statistic(*map(torch.arange, map(len, units)))
    return make_figure(group, metric, value, interval, {**_count(units), **more}, network=network, floor=floor)


def _count(units: UnitsOfBoth) -> dict[str, int]:
    real, generated = units
    return {**real.count("real"), **generated.count("generated")}


def _halvings(units: UnitsOfBoth, sampling: Sampling) -> Iterator[tuple[Indices, Indices, Indices]]:
    """Two real sets without a common subject and a part of the generated one, with equal numbers of each class."""
    real, generated = units
    of_classes = generated.of_classes
    generators = [torch.Generator().manual_seed(sampling.seed) for _ in of_classes]
    for a, b in real.halvings([len(volumes) for volumes in of_classes], sampling.num_halvings, sampling.seed):
        counts = real.classes[a].bincount(minlength=len(of_classes)).tolist()
        parts = [
            volumes[torch.randperm(len(volumes), generator=generator)[:count]]
            for volumes, generator, count in zip(of_classes, generators, counts, strict=True)
        ]
        yield a, b, torch.cat(parts)


def _manifold_floors(
    real: Tensor, generated: Tensor, neighbours: int, units: UnitsOfBoth, sampling: Sampling
) -> dict[str, Floor]:
    """Floors by metric; none where halves of the real set are too small for this many neighbours."""
    drawn = list(_halvings(units, sampling))
    half = len(drawn[0][0]) if drawn else 0
    if half <= neighbours:
        return {}
    found = [
        [precision_recall_density_coverage(real[b], x, neighbours) for x in (real[a], generated[part])]
        for a, b, part in drawn
    ]
    return {
        metric: Floor(*(fmean(pair[i][metric].mean().item() for pair in found) for i in (0, 1)), half)
        for metric in found[0][0]
    }
