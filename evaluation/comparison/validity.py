"""Distances of real volumes to real, reconstructed, other, noisy and blurred ones, and checks of their order."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from common.errors import UserError
from common.files import file_sha256
from common.log import get_logger
from common.processes import PATIENCE, Distributed, joined
from config.loading import require
from evaluation.comparison.degradations import DEGRADATIONS, Degraded, ReconstructedFeatures
from evaluation.comparison.features import SetFeatures, extract
from evaluation.comparison.figures import Sampling, diversity_figures, memorisation_figures, memorisation_of
from evaluation.comparison.networks import VOLUME, FeatureNetwork, build_networks, describe_networks
from evaluation.comparison.pairs import pair_scores
from evaluation.comparison.sets import (
    Group,
    SetVolume,
    groups_of_one_set,
    list_set,
    on_one_grid,
    read_groups,
    units_of,
)
from evaluation.comparison.warnings import diversity_warning, memorisation_warnings
from evaluation.metrics.distances import frechet_distance
from evaluation.metrics.intervals import subsampling_interval
from evaluation.metrics.units import Units, by_subject
from evaluation.results.results import Curves, Results, Series, TextTable, Warned, make_folders
from evaluation.results.scales import make_figure

Planes = dict[str, Tensor]  # features (N, S, F) by plane
LEAST = 6  # subjects of a class: three parts of two
SAME = 1e-6  # relative difference that the order of summation makes

DEFINITIONS = {
    "FID of a half": "Fréchet distance between the features of one random half of the real volumes and those of the "
    "other half after what the name says (real: as they are), mean over random halvings, one volume of each subject; "
    "no interval",
    "FID to itself": "Fréchet distance between the features of the real volumes and those of the same volumes with "
    "noise (Gaussian, added to intensities in [-1, 1], then limited to these) or blur (Gaussian, in voxels)",
    "interval": "95 %, resamples of 80 % of the subjects without replacement, their spread scaled to all of them and "
    "shifted to lie around the value",
    "reconstructed": "by the autoencoder, limited to [-1, 1]",
}


@dataclass(frozen=True)
class Check:
    """One thing that has to hold."""

    group: str
    network: str
    name: str
    found: str
    passed: bool


def measure(cfg: DictConfig) -> bool:
    """Measure and write the results. Returns whether all checks hold, on ranks other than 0 and for a shard True."""
    require(cfg, "real", "output_dir")
    with joined(cfg.device, PATIENCE, "exact") as place:
        results, checks = evaluate(cfg, place)
        if place.is_main and cfg.shard is None:
            path = results.write(Path(cfg.output_dir))
            logger = get_logger()
            for check in checks:
                where = f"{check.group}, {check.network}" if check.network else check.group
                level = logging.INFO if check.passed else logging.ERROR
                logger.log(level, "%s: %s: %s", where, check.name, check.found)
            failed = sum(not check.passed for check in checks)
            logger.info("%d of %d checks hold: %s", len(checks) - failed, len(checks), path)
        return all(check.passed for check in checks)


def evaluate(cfg: DictConfig, place: Distributed) -> tuple[Results, list[Check]]:
    """All distances and checks; on ranks other than 0 and for a shard none.

    UserError: as evaluation/generation_metrics.py.
    """
    groups, others, excluded, warnings = place.on_main(lambda: find_groups(cfg))
    networks = build_networks(cfg.networks, cfg.weights_dir, cfg.slices, place.device)
    reconstruction = None  # autoencoder, SHA-256 of its file
    if cfg.AE_ckpt is not None:
        reconstruction = load_autoencoder(cfg.AE_ckpt, place.device), file_sha256(cfg.AE_ckpt)
    place.on_main(lambda: make_folders(cfg, "validity"), share=False)
    settings = {**OmegaConf.to_container(cfg, resolve=True), **describe_networks(networks, place.device)}
    results = Results("validity", settings, DEFINITIONS, warnings=warnings)

    checks, concludes = [], place.is_main and cfg.shard is None
    for group in groups:
        for network in networks:
            sets = degraded_sets(cfg, network, reconstruction, group, others.get(group.name), excluded, place)
            if concludes:
                checks += add_distances(cfg, results, group.name, network, sets)
                if network.takes_volumes:
                    checks += memorisation_checks(cfg, group.name, network.name, sets["real"])
        real = [volume for volume in group.sets["real"] if volume.path not in excluded]
        honest = pair_scores(cfg, real, units_of(real), f"real volumes of {group.name}", place)
        repeated = [real[0]] * len(real)  # each of another "subject", as what a generator makes
        collapsed = pair_scores(cfg, repeated, Units.own(len(real)), f"one volume of {group.name}", place)
        if concludes:
            gaps = [diversity_figures(group.name, honest, one, Sampling.of(cfg))[-1] for one in (honest, collapsed)]
            lowest = gaps[1].no_interval or f"from {gaps[1].interval[0]:.3f}"
            found = f"gap {gaps[1].value:.3f} ({lowest}), of real volumes {gaps[0].value:.3f}"
            passed = bool(diversity_warning(group.name, gaps[1])) and not diversity_warning(group.name, gaps[0])
            checks.append(Check(group.name, "", "a generator that repeats one volume is noticed", found, passed))
    results.excluded = [{"file": str(path), "reason": reason} for path, reason in excluded.items()]
    rows = [[c.group, c.network, c.name, c.found, "holds" if c.passed else "FAILS"] for c in checks]
    results.tables.append(TextTable("Checks", ("class", "network", "check", "found", ""), rows))
    for check in (check for check in checks if not check.passed):
        place = ", ".join(filter(None, (check.group, check.network)))
        results.warnings.append(Warned(place, check.found, f": check failed: {check.name}"))
    return results, checks


def find_groups(cfg: DictConfig) -> tuple[list[Group], dict[str, tuple[SetVolume, ...]], dict[Path, str], list[str]]:
    """Real volumes by class, the other volumes that each class is compared with, what is left out, and notes."""
    names = "real", Path(cfg.real).name
    groups, notes = groups_of_one_set(cfg.real, "real", *names, cfg.real_range, cfg.subject_pattern)
    count, other = len(groups), []
    if cfg.other is not None:  # whose subjects play no part: how far these volumes are is all that is asked
        files = [file for of_class in list_set(cfg.other, "other").values() for file in of_class]
        other = [Group("other", {"real": tuple(SetVolume(file, tuple(cfg.real_range)) for file in files)})]
    everything, grids, problems = read_groups([*groups, *other], cfg.exclude_unreadable)
    groups = on_one_grid(everything[:count], grids, resample=False, ignore_spacing=True)
    for group in groups:
        _check_number(group.name, group.sets["real"])
    compared = everything[count:] * count or [*groups[1:], groups[0]]  # the other volumes, else the next class
    others = {group.name: one.sets["real"] for group, one in zip(groups, compared, strict=True) if one is not group}
    return groups, others, problems, notes


def _check_number(name: str, real: Sequence[SetVolume]) -> None:
    units = units_of(real)
    if units.num_subjects < LEAST:
        raise UserError(f"{name}: {units.said('real')}, at least {LEAST}{units.each} are needed")


def degraded_sets(
    cfg: DictConfig, network: FeatureNetwork, reconstruction, group: Group, other, excluded: dict, place: Distributed
) -> dict[str, SetFeatures | None]:
    """Features of the real volumes as they are ("real") and degraded ("noise 0.1", ...), on rank 0.

    reconstruction: autoencoder and SHA-256 of its file; None: no reconstructions. other: volumes of another class, None
    likewise. excluded: gets what is left out.
    """

    def features(net: FeatureNetwork, volumes: Sequence, name: str) -> SetFeatures | None:
        return extract(cfg, net, volumes, f"{group.name}, {name}", excluded, place)

    sets = {"real": features(network, group.sets["real"], "real")}
    real = [volume for volume in group.sets["real"] if volume.path not in excluded]
    _check_number(group.name, real)
    if reconstruction is not None:
        sets["reconstructed"] = features(ReconstructedFeatures(network, *reconstruction), real, "reconstructed")
    if other is not None:
        sets["other"] = features(network, other, "other")
    for kind, levels, _ in DEGRADATIONS:
        for level in levels:
            worse = [Degraded(volume, kind, level) for volume in real]
            sets[f"{kind} {level:g}"] = features(network, worse, f"{kind} {level:g}")
    return sets


def add_distances(
    cfg: DictConfig, results: Results, name: str, network: FeatureNetwork, sets: dict[str, SetFeatures]
) -> list[Check]:
    """Figures, curves and checks of one class on one network."""
    real, count, units = sets["real"].planes, len(sets["real"]), units_of(sets["real"].volumes)
    # Of every set as many, so that their distances compare.
    half = min(units.num_subjects // 2, len(sets.get("other", sets["real"])))
    order = [what for what in ("other", "reconstructed", "real") if what in sets]
    halves = {what: halves_distance(cfg, units, real, sets[what].planes, half) for what in order}
    for what, value in halves.items():
        figure = make_figure(name, f"FID of a half: {what}", value, None, {"of each": half}, network=network.name)
        results.figures.append(figure)
    checks = []
    if len(halves) > 1:
        passed = all(a > b for a, b in pairwise(halves.values()))
        shown = ", ".join(f"{what} {value:.4g}" for what, value in halves.items())
        checks.append(Check(name, network.name, " is farther than ".join(halves), shown, passed))
    for kind, levels, unit in DEGRADATIONS:
        worse = {level: sets[f"{kind} {level:g}"].planes for level in levels}
        curves, check = compare_levels(cfg, results, name, network.name, kind, units, real, worse)
        two_halves = Series("two real halves", [0, levels[-1]], [halves["real"]] * 2)
        title = f"{name}: {kind} ({network.name})"
        results.curves.append(Curves(title, unit, "Fréchet distance", [curves, two_halves]))
        checks.append(check)

    everything = torch.arange(count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(cfg.seed))
    last = worse[levels[-1]]
    before = paired_distance(real, last, everything)
    after = paired_distance(real, {plane: of_plane[shuffled] for plane, of_plane in last.items()}, everything)
    passed = abs(before - after) <= SAME * abs(after)
    shown = f"{before:.9g}, shuffled {after:.9g}"
    return [*checks, Check(name, network.name, "order changes nothing", shown, passed)]


def compare_levels(
    cfg: DictConfig,
    results: Results,
    name: str,
    network: str,
    kind: str,
    units: Units,
    real: Planes,
    worse: dict[float, Planes],
) -> tuple[Series, Check]:
    """Figures of one degradation: its distances to the volumes as they are, by level, as a curve, and the check."""
    values, low, high = [0.0], [0.0], [0.0]  # of the set as it is
    for level, planes in worse.items():
        to_itself = partial(paired_distance, real, planes)
        of_subjects = by_subject(to_itself, [units])
        interval = subsampling_interval(*of_subjects, num_resamples=cfg.num_resamples, seed=cfg.seed)
        values.append(to_itself(torch.arange(len(units))))
        metric, num = f"FID to itself: {kind} {level:g}", units.count("real")
        figure = make_figure(name, metric, values[-1], interval, num, network=network)
        results.figures.append(figure)
        low.append(figure.interval[0])
        high.append(figure.interval[1])
    passed = all(a < b for a, b in pairwise(values))
    shown = ", ".join(f"{value:.4g}" for value in values)
    curve = Series(kind, [0, *worse], values, low, high)
    return curve, Check(name, network, f"more {kind} is farther", shown, passed)


def paired_distance(real: Planes, worse: Planes, chosen: Tensor) -> float:
    """FID of some of the real volumes with the same of the worse ones, mean over planes."""
    return fmean(frechet_distance(real[p][chosen].flatten(0, 1), worse[p][chosen].flatten(0, 1)) for p in real)


def halves_distance(cfg: DictConfig, units: Units, real: Planes, worse: Planes, half: int) -> float:
    """FID of `half` real volumes with as many of other subjects of the worse set, mean over planes and random draws.

    A worse set of another length is that of other volumes: a random part of it is taken.
    """
    plane = next(iter(real))
    count, other = len(real[plane]), len(worse[plane])
    generator = torch.Generator().manual_seed(cfg.seed)
    distances = []
    for a, b in units.halvings([half], cfg.num_halvings, cfg.seed):
        part = b if other == count else torch.randperm(other, generator=generator)[:half]
        distances += [frechet_distance(real[p][a].flatten(0, 1), worse[p][part].flatten(0, 1)) for p in real]
    return fmean(distances)


def memorisation_checks(cfg: DictConfig, name: str, network: str, real: SetFeatures) -> list[Check]:
    """A third of the subjects as training set, one held out, one as what an honest generator makes; and copies."""
    features, units = real.planes[VOLUME][:, 0], units_of(real.volumes)  # (N, F)
    order = torch.randperm(units.num_subjects, generator=torch.Generator().manual_seed(cfg.seed))
    training, held_out, honest = (units.volumes([part]) for part in order.tensor_split(3))
    checks = []
    for what, generated in (("copies of training volumes", training), ("new real volumes", honest)):
        is_copy = generated is training
        sets = (features[part] for part in (held_out, generated, training))
        memory = memorisation_of(*sets, (units[held_out], units[generated]))
        figures = memorisation_figures(name, network, memory, len(training), Sampling.of(cfg))
        noticed = bool(memorisation_warnings(name, network, memory, figures))
        found = f"nearer than held-out: {figures[0].value:.2f}, distance ratio {figures[1].value:.2f}"
        title = f"{what} {'are' if is_copy else 'are not'} taken for memorised"
        checks.append(Check(name, network, title, found, noticed == is_copy))
    return checks
