"""The figures of a run's generated volumes against held-out ones, with what they would be of other volumes."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from AutoEncoder.checkpoint import load_autoencoder
from common.errors import UserError
from common.files import file_sha256
from common.memory import free_memory
from common.processes import Distributed
from common.progress import tracked
from config.loading import load_config
from config.schema.evaluation import GenerationMetricsConfig, fewest_volumes
from dataset.order.data_split import HELD_OUT, TRAINING
from dataset.volumes.geometry import size_text
from dataset.volumes.index import list_volumes
from dataset.volumes.pictures import central_slices
from dataset.volumes.volume_io import read_header, write_volume
from evaluation.autoencoding.measures import reconstruct
from evaluation.comparison.features import SetFeatures
from evaluation.comparison.figures import mmd_statistics
from evaluation.comparison.generation_metrics import extract_group, find_groups, pairs_of
from evaluation.comparison.networks import VOLUME, build_networks
from evaluation.comparison.pairs import PairScores
from evaluation.comparison.sets import Group, SetVolume, groups_of_one_set, list_set, units_of
from evaluation.generation.requests import list_requests
from evaluation.metrics.distances import frechet_distance
from evaluation.metrics.intervals import bootstrap_spread, subsampling_spread
from evaluation.metrics.manifolds import precision_recall_density_coverage
from evaluation.metrics.units import Units, by_subject
from evaluation.study.statistics import Measured

# Random networks see texture, need no files and are the same everywhere; pretrained ones judge a finished model.
NETWORKS = ("random_3d", "random_2d")
MANIFOLD = ("precision", "recall", "density", "coverage")
FIGURES = ("FID-3D", "FID-2.5D", "MMD", *MANIFOLD, "diversity gap")
PLANE, PICTURED = "axial", 4  # volumes of each class
VERSION = 1  # rises when the same volumes give other figures

OfClass = Callable[[Tensor, Tensor], float]  # of some real and some generated volumes of one class
Sets = tuple[SetFeatures, SetFeatures]  # real and generated ones


class GeneratedJudge:
    """Compares sets of volumes with the held-out ones of a study. Each figure is the mean over the classes.

    floor, ceiling: as many training volumes as a run generates, and the same after encoding and decoding; another draw
    for each seed. Both have no volume in common with the held-out ones and are as large as a run's sets, so that their
    figures compare with those of runs, which those of real halves would not.
    """

    names = FIGURES

    def __init__(self, study: DictConfig, place: Distributed) -> None:
        self.study, self.place = study, place
        volumes = study.volumes or study.data
        self.real, _ = groups_of_one_set(f"{volumes}:{HELD_OUT}", "volumes", "real", "", study.real_range, None)
        self.training, _ = groups_of_one_set(f"{volumes}:{TRAINING}", "volumes", "real", "", study.real_range, None)
        self._check_counts()
        self.networks = build_networks(NETWORKS, None, study.slices, place.device)
        names = ("real_range", "neighbours", "slices", "num_pairs", "num_resamples")
        self.settings = {"version": VERSION, "samples": study.num_samples, **{name: study[name] for name in names}}
        self.settings["real_range"] = list(study.real_range)
        self.settings["held_out"] = [file_sha256(v.path) for group in self.real for v in group.sets["real"]]

    def _check_counts(self) -> None:
        least = fewest_volumes(self.study.neighbours)
        for group in (*self.real, *self.training):
            if len(sizes := {read_header(volume.path).shape for volume in group.sets["real"]}) > 1:
                raise UserError(
                    f"volumes: {group.name} has {' and '.join(map(size_text, sorted(sizes)))}: a study compares one "
                    "size of each class: name a dataset JSON with the folders of that size"
                )
        for group in self.real:
            if (found := units_of(group.sets["real"]).num_subjects) < least:
                raise UserError(
                    f"volumes: {group.name} has {found} held-out subjects, neighbours={self.study.neighbours} needs "
                    f"{least}: hold out more (dataset/split.py), or take fewer neighbours"
                )
        for group in self.training:
            if len(group.sets["real"]) < self.study.num_samples:
                raise UserError(
                    f"num_samples is {self.study.num_samples}, but {group.name} has {len(group.sets['real'])} training "
                    "volumes, of which as many are drawn to compare with: take fewer"
                )

    def check_requests(self, cfg: DictConfig) -> None:
        """UserError where the volumes that a generation would make can't be compared with the held-out ones."""
        requests = list_requests(cfg)
        classes = list_set(f"{self.study.volumes or self.study.data}:{HELD_OUT}", "volumes")
        by_id = all(name.isdigit() for name in classes)
        asked = {str(request.class_id if by_id else request.class_name): request.voxels for request in requests}
        for name, files in classes.items():
            shape = read_header(files[0]).shape
            if asked.get(name) != shape:
                made = f"in {asked[name]} voxels" if name in asked else f"not at all, but {', '.join(asked)}"
                raise UserError(f"generation: makes {name} {made}; its held-out volumes have {shape}: classes must fit")

    def of_run(self, folder: Path) -> dict[str, Measured]:
        """The figures of the volumes that a generation left in a folder."""
        volumes = self.study.volumes or self.study.data
        cfg = self._config(real=f"{volumes}:{HELD_OUT}", generated=str(folder))
        groups, *_ = find_groups(cfg)
        return self._measure(cfg, groups)

    def of_references(self, output: Path) -> dict[str, list[dict[str, Measured]]]:
        """Floor and ceiling, by name, for each seed. Reconstructions go to `output` and stay there."""
        found: dict[str, list[dict[str, Measured]]] = {"floor": [], "ceiling": []}
        for seed in self.study.seeds:
            drawn = self.drawn(seed)
            found["floor"].append(self._measure_sets(drawn))
            found["ceiling"].append(self._measure_sets(self.reconstructed(drawn, output)))
        return found

    def drawn(self, seed: int) -> dict[str, list[SetVolume]]:
        """Training volumes of each class, as many as a run generates."""
        generator, drawn = torch.Generator().manual_seed(seed), {}
        for group in self.training:
            volumes = group.sets["real"]
            chosen = torch.randperm(len(volumes), generator=generator)[: self.study.num_samples].tolist()
            drawn[group.name] = [volumes[i] for i in chosen]
        return drawn

    def reconstructed(self, drawn: Mapping[str, Sequence[SetVolume]], output: Path) -> dict[str, list[SetVolume]]:
        """Files of the same volumes after encoding and decoding; those that are there stay."""
        folder = output / file_sha256(self.study.autoencoder)[:12]
        files = {v: folder / f"{v.key()[:16]}.nii.gz" for volumes in drawn.values() for v in volumes}
        missing = {volume: file for volume, file in files.items() if not file.exists()}
        autoencoder = load_autoencoder(self.study.autoencoder, self.place.device) if missing else None
        for volume, file in tracked(missing.items(), "reconstructing", "volume"):
            x = volume.read().to(self.place.device)
            y, _ = reconstruct(autoencoder, x, free_memory(self.place.device))
            write_volume(file, y.clamp(-1, 1).cpu(), read_header(volume.path).affine)
        return {name: [SetVolume(files[volume]) for volume in volumes] for name, volumes in drawn.items()}

    def slices(self, shown: Mapping[str, Path], output: Path) -> list[tuple[str, list[np.ndarray]]]:
        """Rows of the picture: real and reconstructed training volumes, and what each variant generated."""
        drawn = self.drawn(self.study.seeds[0])
        sets = {"floor: real": drawn, "ceiling: reconstructed": self.reconstructed(drawn, output / "ceiling")}
        rows = {name: [volumes[:PICTURED] for volumes in of.values()] for name, of in sets.items()}
        for variant, folder in shown.items():
            classes = groupby(list_volumes(folder), lambda file: file.name.rpartition("_")[0])  # NAME_XxYxZ_I.nii.gz
            rows[variant] = [[SetVolume(file) for file in files][:PICTURED] for _, files in classes]
        return [
            (name, [central_slices(volume.read())[PLANE] for of_class in classes for volume in of_class])
            for name, classes in rows.items()
        ]

    def _config(self, **sets: str) -> DictConfig:
        study = self.study
        values = {name: study[name] for name in ("real_range", "neighbours", "slices", "num_pairs", "device")}
        values |= {"output_dir": study.output_dir, "ignore_spacing": True, "num_workers": 0, **sets}
        return load_config(GenerationMetricsConfig, None, values=values)

    def _measure_sets(self, others: Mapping[str, Sequence[SetVolume]]) -> dict[str, Measured]:
        groups = [Group(g.name, {"real": g.sets["real"], "generated": tuple(others[g.name])}) for g in self.real]
        return self._measure(self._config(), groups)

    def _measure(self, cfg: DictConfig, groups: Sequence[Group]) -> dict[str, Measured]:
        features: dict[str, list[Sets]] = {}
        for network in self.networks:
            found = [extract_group(cfg, network, group, {}, self.place) for group in groups]
            features[network.name] = [(sets["real"], sets["generated"]) for sets in found]
        pairs = [pairs_of(cfg, group, (), self.place) for group in groups]
        units = tuple(units_of(*(group.sets[role] for group in groups)) for role in ("real", "generated"))
        statistics = statistics_of(features, cfg.neighbours)
        how = {"num_resamples": self.study.num_resamples, "seed": 0}
        measured = {name: measure_sets(of_classes, units, how) for name, of_classes in statistics.items()}
        return {**measured, "diversity gap": measure_gap(pairs, how)}


def statistics_of(features: Mapping[str, Sequence[Sets]], neighbours: int) -> dict[str, list[OfClass]]:
    """Figure -> of each class a function of some of its real and some of its generated volumes."""
    volumes, slices = (features[name] for name in NETWORKS)
    return {
        "FID-3D": [_fid(sets) for sets in volumes],
        "FID-2.5D": [_fid(sets) for sets in slices],
        "MMD": [_mmd(sets) for sets in volumes],
        **_manifolds(volumes, neighbours),
    }


def _fid(sets: Sets) -> OfClass:
    """The mean over the planes."""
    real, generated = (of.planes for of in sets)  # {plane: (N, S, F)}
    return lambda a, b: fmean(
        frechet_distance(real[plane][a].flatten(0, 1), generated[plane][b].flatten(0, 1)) for plane in real
    )


def _mmd(sets: Sets) -> OfClass:
    units = tuple(units_of(of.volumes) for of in sets)
    return mmd_statistics(*(of.planes[VOLUME][:, 0] for of in sets), units)[0]


def _manifolds(classes: Sequence[Sets], neighbours: int) -> dict[str, list[OfClass]]:
    memory: dict[tuple, dict[str, float]] = {}  # the four ask for the same resamples

    def measure(metric: str, number: int, a: Tensor, b: Tensor) -> float:
        key = (number, a.numpy().tobytes(), b.numpy().tobytes())
        if key not in memory:
            real, generated = classes[number]
            subjects = tuple(units_of(of.volumes).subjects[chosen] for of, chosen in ((real, a), (generated, b)))
            x, y = (of.planes[VOLUME][chosen, 0] for of, chosen in ((real, a), (generated, b)))
            found = precision_recall_density_coverage(x, y, neighbours, subjects)
            memory[key] = {name: values.mean().item() for name, values in found.items()}
        return memory[key][metric]

    return {
        metric: [lambda a, b, m=metric, i=number: measure(m, i, a, b) for number in range(len(classes))]
        for metric in MANIFOLD
    }


def measure_sets(of_classes: Sequence[OfClass], units: tuple[Units, Units], how: Mapping[str, int]) -> Measured:
    """The mean over classes, and its spread over subjects of either set, resampled within the classes.

    units: of the real and the generated volumes, class after class.
    """
    every = tuple(torch.arange(len(of)) for of in units)

    def statistic(a: Tensor, b: Tensor) -> float:
        chosen = zip(of_classes, _by_class(units[0], a), _by_class(units[1], b), strict=True)
        return fmean(of_class(x, y) for of_class, x, y in chosen)

    of_real, sizes = by_subject(lambda a: statistic(a, every[1]), units[:1])
    of_generated, generated_sizes = by_subject(lambda b: statistic(every[0], b), units[1:])
    return Measured(
        statistic(*every),
        subsampling_spread(of_real, sizes, **how),
        subsampling_spread(of_generated, generated_sizes, **how),
    )


def _by_class(units: Units, chosen: Tensor) -> list[Tensor]:
    """Numbers within their class, of numbers within all."""
    first = [int(volumes[0]) for volumes in units.of_classes]
    return [chosen[units.classes[chosen] == label] - first[label] for label in range(units.num_classes)]


def measure_gap(classes: Sequence[Sequence[PairScores]], how: Mapping[str, int]) -> Measured:
    """MS-SSIM of generated pairs less that of real ones, mean over classes. classes: (real, generated) of each."""
    real, generated = ([of_class[i] for of_class in classes] for i in (0, 1))

    def mean(of: Sequence[PairScores], chosen: Sequence[Tensor]) -> float:
        return fmean(scores.mean_of(some) for scores, some in zip(of, chosen, strict=True))

    means = [fmean(scores.scores.mean().item() for scores in of) for of in (real, generated)]
    return Measured(
        means[1] - means[0],
        bootstrap_spread(lambda *chosen: means[1] - mean(real, chosen), [of.num_units for of in real], **how),
        bootstrap_spread(lambda *chosen: mean(generated, chosen) - means[0], [of.num_units for of in generated], **how),
    )
