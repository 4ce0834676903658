"""Figures of generated beside real volumes, class by class: distances, manifolds, diversity and memorisation."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from common.errors import UserError
from common.log import get_logger
from common.processes import PATIENCE, Distributed, joined
from config.loading import require
from evaluation.comparison.definitions import DEFINITIONS
from evaluation.comparison.features import SetFeatures, extract
from evaluation.comparison.figures import (
    Sampling,
    distance_figures,
    diversity_figures,
    manifold_figures,
    median,
    memorisation_figures,
    memorisation_of,
)
from evaluation.comparison.networks import VOLUME, FeatureNetwork, build_networks, describe_networks
from evaluation.comparison.pairs import PairScores, pair_scores
from evaluation.comparison.pictures import nearest_picture, panel, side_by_side
from evaluation.comparison.ranges import check_ranges, sample_ranges
from evaluation.comparison.sets import ALL, Group, group_volumes, on_one_grid, read_groups, units_of
from evaluation.comparison.warnings import (
    content_warnings,
    distance_warnings,
    diversity_warning,
    memorisation_warnings,
    noise_warning,
)
from evaluation.metrics.reconstruction import num_scales_of
from evaluation.results.results import Beside, Results, TextTable, Warned, file_names, make_folders, write_csv

KIND = "generation"
MEMORISATION_FILE = "memorisation.csv"
WITHOUT_INTERVAL = " without interval: there are too few subjects or pairs to resample"
CLOSEST = 8  # pairs of generated and training volumes in the picture and table
Sets = dict[str, SetFeatures | None]  # by role; None on ranks other than 0 and for a shard
MEMORISATION_COLUMNS = ("class", "network", "generated", "nearest_training", "distance", "median_held_out_distance")


def measure(cfg: DictConfig) -> None:
    require(cfg, "real", "generated", "output_dir")
    with joined(cfg.device, PATIENCE, "exact") as place:
        results = evaluate(cfg, place)
        if results is not None:
            path = results.write(Path(cfg.output_dir))
            logger = get_logger()
            for warning in results.warnings:
                logger.warning(warning)
            logger.info("%d figures in %s", len(results.figures), path)


def evaluate(cfg: DictConfig, place: Distributed) -> Results | None:
    """All figures of a config, on rank 0; None on other ranks and for a shard.

    Pictures and memorisation.csv are written on the way.
    Raises UserError for whatever is wrong with options, sets or weight files before anything is computed, and for files
    that turn out damaged after the sound ones have been computed (and kept).
    """
    groups, warnings, excluded = place.on_main(lambda: find_groups(cfg))
    networks = build_networks(cfg.networks, cfg.weights_dir, cfg.slices, place.device)
    if cfg.training and not any(network.takes_volumes for network in networks):
        raise UserError("training: the memorisation check needs a network of whole volumes: add one to networks")
    place.on_main(lambda: make_folders(cfg, KIND), share=False)
    found = {
        network.name: {group.name: extract_group(cfg, network, group, excluded, place) for group in groups}
        for network in networks
    }
    pairs = {group.name: pairs_of(cfg, group, excluded, place) for group in groups}
    if not place.is_main or cfg.shard is not None:
        return None

    settings = {**OmegaConf.to_container(cfg, resolve=True), **describe_networks(networks, place.device)}
    results = Results(KIND, settings, DEFINITIONS, warnings=warnings)
    for name in (network.name for network in networks if network.is_random):
        meaning = ": distances on random features can't be compared with published ones"
        results.warnings.append(Warned("", f"{name} is an untrained network", meaning))
    results.excluded = [{"file": str(path), "reason": reason} for path, reason in excluded.items()]
    for network in networks:
        add_distances(cfg, results, network, found[network.name])
    for name, (real, generated) in pairs.items():
        figures = diversity_figures(name, real, generated, Sampling.of(cfg))
        results.figures += figures
        results.warnings += diversity_warning(name, figures[-1]) + noise_warning(name, figures[-1])
        if missing := ", ".join(figure.metric for figure in figures if figure.no_interval):
            results.warnings.append(Warned(name, missing, WITHOUT_INTERVAL))
    if excluded:
        results.warnings.append(f"{len(excluded)} volumes were left out (excluded): the figures are those of the rest")
    of_first = found[networks[0].name]
    for name, sets in of_first.items():
        results.warnings += content_warnings(name, networks[0].planes[0], sets["real"], sets["generated"])
    if cfg.training:
        add_memorisation(cfg, results, networks, found)
    else:
        (Path(cfg.output_dir) / MEMORISATION_FILE).unlink(missing_ok=True)  # of an earlier run
    if cfg.num_pictures:
        for (name, sets), stem in zip(of_first.items(), file_names(list(of_first)), strict=True):
            real, generated = (sets[role].volumes[: cfg.num_pictures] for role in ("real", "generated"))
            results.pictures.append(side_by_side(cfg, name, stem, real, generated))
            for number, (one, other) in enumerate(zip(real, generated, strict=False), start=1):
                results.volumes.append(Beside(f"{name} {number}", [panel(one, "real"), panel(other, "generated")]))
    return results


# ---------------------------------------------------------------------------------------------------------------- sets


def find_groups(cfg: DictConfig) -> tuple[list[Group], list[str], dict[Path, str]]:
    """The sets of each class, after all checks that headers allow; notes; files that are left out with the reason."""
    ranges = cfg.real_range, cfg.generated_range
    groups, notes = group_volumes(cfg.real, cfg.generated, cfg.training, *ranges, cfg.subject_pattern)
    groups, grids, problems = read_groups(groups, cfg.exclude_unreadable)
    groups = on_one_grid(groups, grids, cfg.resample, cfg.ignore_spacing)
    for group in groups:
        first = group.sets["real"][0]
        num_scales_of((first.resample or grids[first.path]).shape)  # refuses volumes that are too small for MS-SSIM
        notes += check_ranges(group, sample_ranges(group))
    return groups, notes, problems


def extract_group(
    cfg: DictConfig, network: FeatureNetwork, group: Group, excluded: dict[Path, str], place: Distributed
) -> Sets:
    """The features of each set of a group that the network is needed for; memorisation goes by whole volumes alone."""
    return {
        role: extract(cfg, network, volumes, f"{role} volumes of {group.name}", excluded, place)
        for role, volumes in group.sets.items()
        if role != "training" or network.takes_volumes
    }


def pairs_of(cfg: DictConfig, group: Group, excluded: Collection[Path], place: Distributed) -> list[PairScores]:
    """MS-SSIM of pairs of real and of generated volumes, but for those that are left out."""
    kept = {role: [v for v in group.sets[role] if v.path not in excluded] for role in ("real", "generated")}
    return [pair_scores(cfg, of, units_of(of), f"{role} {group.name}", place) for role, of in kept.items()]


# ----------------------------------------------------------------------------------------------------------- distances


def add_distances(cfg: DictConfig, results: Results, network: FeatureNetwork, found: dict[str, Sets]) -> None:
    """FID and, on features of volumes, MMD, precision, recall, density and coverage; of each class and of all."""
    sampling = Sampling.of(cfg)
    sets = {name: [of] for name, of in found.items()}
    if len(found) > 1:
        sets |= _all_classes(results, found)
    for name, classes in sets.items():
        get_logger().info("figures of %s on %s", name, network.name)
        real, generated = (_joined(classes, role) for role in ("real", "generated"))
        units = tuple(units_of(*(of[role].volumes for of in classes)) for role in ("real", "generated"))
        try:
            figures = distance_figures(name, network.name, real, generated, units, sampling)
        except UserError as error:  # of features that are all the same
            raise UserError(f"{name}, {network.name}: {error}") from error
        results.warnings += distance_warnings(name, network.name, real, generated)
        num_others = [units_of_set.num_others for units_of_set in units]
        if network.takes_volumes and min(num_others) >= cfg.neighbours:
            x, y = real[VOLUME][:, 0], generated[VOLUME][:, 0]  # (N, F), (M, F)
            figures += manifold_figures(name, network.name, x, y, cfg.neighbours, units, sampling)
        elif network.takes_volumes:
            found = " and ".join(of.said(role) for of, role in zip(units, ("real", "generated"), strict=True))
            meaning = (
                f": precision, recall, density and coverage need more than neighbours={cfg.neighbours} volumes in each "
                "set, beside a volume those of other subjects"
            )
            results.warnings.append(Warned(name, found, meaning))
        results.figures += figures
        if missing := ", ".join(figure.metric for figure in figures if figure.no_interval):
            results.warnings.append(Warned(name, missing, WITHOUT_INTERVAL))


def _joined(classes: Sequence[Sets], role: str) -> dict[str, Tensor]:
    """The features of a role, class after class."""
    return {plane: torch.cat([of[role].planes[plane] for of in classes]) for plane in classes[0][role].planes}


def _all_classes(results: Results, found: dict[str, Sets]) -> dict[str, list[Sets]]:
    """The sets of all classes, to be put together; none where their slices don't fit."""
    classes = list(found.values())
    if len({tuple(features.shape[1] for features in of["real"].planes.values()) for of in classes}) > 1:
        note = f"{ALL}: classes differ in size, so that they have different numbers of slices: not put together"
        results.warnings.append(note)
        return {}
    totals = {role: sum(len(of[role]) for of in classes) for role in ("real", "generated")}
    if any(abs(len(of["real"]) / totals["real"] - len(of["generated"]) / totals["generated"]) > 0.01 for of in classes):
        note = f"{ALL}: the classes' shares differ between real and generated volumes, which adds to every distance"
        results.warnings += [note] if note not in results.warnings else []
    return {ALL: classes}


# -------------------------------------------------------------------------------------------------------- memorisation


def add_memorisation(
    cfg: DictConfig, results: Results, networks: Sequence[FeatureNetwork], found: dict[str, dict[str, Sets]]
) -> None:
    """Figures, memorisation.csv, and the closest pairs as table and picture."""
    rows = []
    for network in (network for network in networks if network.takes_volumes):
        of_network = found[network.name]
        for (name, sets), stem in zip(of_network.items(), file_names(list(of_network)), strict=True):
            real, generated, training = (sets[role].planes[VOLUME][:, 0] for role in ("real", "generated", "training"))
            units = tuple(units_of(sets[role].volumes) for role in ("real", "generated"))
            memory = memorisation_of(real, generated, training, units)
            figures = memorisation_figures(name, network.name, memory, len(training), Sampling.of(cfg))
            results.figures += figures
            results.warnings += memorisation_warnings(name, network.name, memory, figures)
            usual = median(memory.held_out)
            nearest = zip(sets["generated"].volumes, memory.nearest.tolist(), memory.generated.tolist(), strict=True)
            for volume, index, distance in nearest:
                copied = sets["training"].volumes[index]
                rows.append([name, network.name, str(volume.path), str(copied.path), distance, usual])
            if cfg.num_pictures:
                results.pictures.append(nearest_picture(cfg, name, stem, network.name, sets, memory))
    write_csv(Path(cfg.output_dir) / MEMORISATION_FILE, MEMORISATION_COLUMNS, rows)
    closest = sorted(rows, key=lambda row: row[4] / row[5] if row[5] else row[4])[:CLOSEST]
    results.tables.append(TextTable(f"Closest pairs (all: {MEMORISATION_FILE})", MEMORISATION_COLUMNS, closest))
