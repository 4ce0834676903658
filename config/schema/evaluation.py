"""Options of the evaluations, of their report, of the demo and of studies."""

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from config.schema.diffusion import FLOW_STRATEGIES, SAMPLING_STRATEGIES
from config.schema.option import device_flag, flag, key, shard
from config.schema.rules import (
    Rule,
    at_least,
    batch,
    between,
    interval,
    name_of_a,
    not_negative,
    one_of,
    positive,
    regex,
    workers,
)

# Those of evaluation/comparison/networks.py
FEATURE_NETWORKS = ("medicalnet_resnet50", "imagenet_resnet50", "radimagenet_resnet50", "random_3d", "random_2d")
known_networks = Rule(
    lambda value: value == ["auto"] or (value and set(value) <= set(FEATURE_NETWORKS)),
    f"auto, or some of {' '.join(FEATURE_NETWORKS)}",
)
some_samplers = Rule(
    lambda value: value and set(value) <= {*SAMPLING_STRATEGIES, *FLOW_STRATEGIES},
    f"some of {' '.join([*SAMPLING_STRATEGIES, *FLOW_STRATEGIES])}",
)
some_seeds = Rule(lambda value: value and min(value) >= 0, "one or more, each at least 0")
LPIPS_CHOICE = "auto (where VGG-16's weight file is there) | on | off"
enough_resamples = between(20, 10_000, "more change no interval")
different = Rule(lambda value: len(set(value)) == len(value), "all different")


def num_resamples() -> Any:
    """The option `--num-resamples` of what has intervals."""
    return flag(200, "resamples of the bootstrap, for 95 % intervals; at least 20", enough_resamples)


@dataclass
class EvaluationConfig:
    """What all evaluations have in common."""

    output_dir: str | None = flag(None, "folder that gets the results, the pictures and the cache; required")
    cache_dir: str | None = flag(None, "folder for what was computed of each volume; null = OUTPUT_DIR/cache")
    weights_dir: str | None = flag(None, "folder with pretrained networks' weight files; null = torch hub's cache")
    real_range: list[float] = flag([-1.0, 1.0], "lowest and highest intensity of the real files", interval)
    subject_pattern: str | None = flag(
        None,
        r"regular expression that finds a real file's subject in its path below the class folder, e.g. 'sub-\d+': its "
        "first group, or all of it; null = as split.json says, without one each file is a subject",
        regex,
    )
    exclude_unreadable: bool = flag(False, "true: files that can't be read are left out and listed; false: an error")
    num_resamples: int = num_resamples()
    num_workers: int = flag(4, "loading processes, at most one per core; 0 = load in the main process", workers)
    seed: int = flag(0, "seed of resamples, halvings and pairs", not_negative)
    shard: str | None = shard()
    device: str = device_flag()


@dataclass
class ReconstructionConfig(EvaluationConfig):
    """How well autoencoders reconstruct volumes that they were not trained on (evaluation/reconstruction.py)."""

    data: str | None = flag(None, "folder or dataset JSON of held-out volumes; required")
    AE_ckpt: list[str] = flag([], "autoencoder checkpoints, e.g. of stage 1 and of stage 2, compared in this order")
    lpips: str = flag("auto", LPIPS_CHOICE, one_of("auto", "on", "off"))
    max_memory: float | None = flag(None, "GB that decoding may take; null = most of what is free", positive)
    num_pictures: int = flag(4, "volumes of each class in the pictures", between(0, 1000))


@dataclass
class FeatureConfig(EvaluationConfig):
    """What evaluations on features have in common."""

    networks: list[str] = flag(
        ["auto"],
        "medicalnet_resnet50, imagenet_resnet50, radimagenet_resnet50, random_3d, random_2d; auto = all whose weight "
        "file is there, random ones in place of what has none",
        known_networks,
    )
    slices: int = flag(
        16, "slices of each plane for networks on slices; all where a volume has fewer", between(1, 32_767)
    )
    batch_size: int = flag(4, "volumes that go through a network together", batch)
    num_halvings: int = flag(10, "random halvings of the real set for the floor", between(1, 1000))
    num_pairs: int = flag(
        100, "pairs of volumes of each set for the diversity; all where there are fewer", between(1, 100_000)
    )


@dataclass
class GenerationMetricsConfig(FeatureConfig):
    """How near generated volumes are to real ones (evaluation/generation_metrics.py)."""

    real: str | None = flag(None, "folder or dataset JSON of real volumes that were not trained on; required")
    generated: str | None = flag(None, "folder (all classes may be in one) or dataset JSON; required")
    training: str | None = flag(None, "folder or dataset JSON of the training volumes; null = no memorisation check")
    generated_range: list[float] | None = flag(
        None, "lowest and highest intensity of generated files; null = as the JSON beside each, else -1 1", interval
    )
    resample: bool = flag(False, "brings all volumes to the spacing and size that most real ones of their class have")
    ignore_spacing: bool = flag(False, "compares voxels whatever their size in mm and the direction of the axes")
    neighbours: int = flag(5, "nearest neighbours of precision, recall, density and coverage", between(1, 1000))
    num_pictures: int = flag(4, "volumes of each set and class in the pictures", between(0, 1000))


@dataclass
class ValidityConfig(FeatureConfig):
    """Whether the distances see what they should (evaluation/validity.py)."""

    real: str | None = flag(None, "folder or dataset JSON of real volumes; required")
    other: str | None = flag(None, "folder of volumes of another class or modality; null = another class of real")
    AE_ckpt: str | None = flag(None, "autoencoder whose reconstructions are to be nearer than other; null = none")


@dataclass
class PairedMetricsConfig:
    """How near controlled generation comes to the truth (evaluation/paired_metrics.py)."""

    data: str | None = flag(None, "JSON of conditions with the true images, or JSON:SIDE of its split; required")
    generated: str | None = flag(None, "output folder of evaluation/controlled_generation.py; required")
    AE_ckpt: str | None = flag(None, "autoencoder checkpoint, for the ceiling; required")
    output_dir: str | None = flag(None, "folder that gets the results; required")
    lpips: str = flag("auto", LPIPS_CHOICE, one_of("auto", "on", "off"))
    weights_dir: str | None = flag(None, "folder with LPIPS' weight files; null = torch hub's cache")
    num_resamples: int = num_resamples()
    seed: int = flag(0, "seed of resamples", not_negative)
    device: str = device_flag()


@dataclass
class ReportConfig:
    """The page of what evaluations found (evaluation/report.py)."""

    input_dir: str | None = flag(None, "folder of the results; required")
    output: str | None = flag(None, "the page; null = report.html in the folder")
    title: str = flag("3D MedDiffusion: evaluation", "title of the page")


@dataclass
class DemoConfig:
    """The whole pipeline on phantoms (evaluation/demo.py)."""

    output_dir: str = flag("demo", "folder of the demo")
    short: bool = flag(False, "a few steps of each stage, figures are not judged")


@dataclass
class DemoControlConfig:
    """Controlled generation on the demo's phantoms (evaluation/demo_control.py)."""

    demo: str = flag("demo", "folder of a finished demo")
    output_dir: str = flag("demo/control", "folder of this one")
    short: bool = flag(False, "a few steps of each stage: shows that they run, not what they reach")


@dataclass
class SamplingStudyConfig:
    """Samplers and numbers of steps on a finished demo (evaluation/sampling_study.py)."""

    demo: str = flag("demo", "folder of a finished demo")
    output_dir: str | None = flag(None, "folder of the results; required")
    strategies: list[str] | None = flag(None, "samplers; null = all of the model's process", some_samplers)
    steps: list[int] = flag([5, 10, 15, 25, 50, 100], "of all but ddpm, which takes every timestep")
    seeds: list[int] = flag([0, 1, 2], "of the noise", some_seeds)
    num_samples: int = flag(8, "volumes per class, run and seed; a distance needs two", between(2, 100_000))
    device: str = device_flag()


def fewest_volumes(neighbours: int) -> int:
    """Of a class, so that resamples of 80 % of them still have so many neighbours each."""
    return max(3, ceil((neighbours + 1) / 0.8))


@dataclass
class Budget:
    """What each run of a study may cost: one of the two."""

    steps: int | None = key(None, "optimiser steps of each run", at_least(1))
    seconds: float | None = key(
        None, "seconds of training of each run, turned into steps by a short run of each variant", positive
    )
    warm_up: int = key(20, "steps of that short run; its second half is timed", at_least(2))


@dataclass
class Variant:
    """A recipe: what it changes."""

    name: str = key("", "its row in the table, and its folder", name_of_a("folder"))
    training: list[str] = key([], "key=value, over the training's configuration")
    generation: list[str] = key([], "key=value, over the generation's configuration")


@dataclass
class RecipeStudyConfig:
    """Training recipes of equal cost, compared on held-out volumes (evaluation/recipe_study.py)."""

    output_dir: str | None = flag(None, "folder of the study; required")
    stage: str = key("diffusion", "diffusion | autoencoder", one_of("diffusion", "autoencoder"))
    base: str | None = key(None, "configuration of the training that variants change; required")
    generation: str | None = key(None, "diffusion: configuration of the generation; required")
    data: str | None = key(None, "JSON of what is trained on: latents, or the autoencoder's volumes; required")
    volumes: str | None = key(
        None, "split.json, or dataset JSON with one, of the volumes that are compared with; null = data"
    )
    autoencoder: str | None = key(
        None, "checkpoint of the autoencoder: that of the latents, or of stage 1 where stage 2 is trained"
    )
    budget: Budget = field(default_factory=Budget)
    seeds: list[int] = key(
        [0, 1, 2], "of training and noise; each variant is trained once with each", some_seeds, different
    )
    variants: list[Variant] = key([], "name, training, generation of each; the others are compared with the first")
    processes: int = key(1, "that a run trains in", between(1, 1024))

    num_samples: int = key(8, "diffusion: volumes generated per class and run", between(1, 100_000))
    real_range: list[float] = key([-1.0, 1.0], "lowest and highest intensity of the volumes' files", interval)
    neighbours: int = key(5, "nearest neighbours of precision, recall, density and coverage", between(1, 1000))
    slices: int = key(8, "slices of each plane for FID-2.5D", between(1, 32_767))
    num_pairs: int = key(
        100, "pairs of volumes of each set for MS-SSIM; all where there are fewer", between(1, 100_000)
    )
    num_resamples: int = key(100, "resamples of the volumes, for the intervals", enough_resamples)
    lpips: str = key(
        "auto", "autoencoder: auto (where VGG-16's weights are there) | on | off", one_of("auto", "on", "off")
    )
    device: str = device_flag()
