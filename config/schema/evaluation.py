"""Options of the evaluations, of their report, of the demo and of the study on it."""

from dataclasses import dataclass

from config.schema.diffusion import SAMPLING_STRATEGIES
from config.schema.option import Rule, at_least, device_key, interval, key, not_negative, one_of, positive

FEATURE_NETWORKS = (  # those of evaluation/comparison/networks.py
    "medicalnet_resnet50",
    "imagenet_resnet50",
    "radimagenet_resnet50",
    "random_3d",
    "random_2d",
)
known_networks = Rule(
    lambda value: value == ["auto"] or (value and set(value) <= set(FEATURE_NETWORKS)),
    f"auto, or some of {' '.join(FEATURE_NETWORKS)}",
)
some_samplers = Rule(
    lambda value: value and set(value) <= set(SAMPLING_STRATEGIES), f"some of {' '.join(SAMPLING_STRATEGIES)}"
)
some_seeds = Rule(lambda value: value and min(value) >= 0, "one or more, each at least 0")


@dataclass
class EvaluationConfig:
    """What all evaluations have in common."""

    output_dir: str | None = key(None, "folder that gets the results, the pictures and the cache; required", flag=True)
    cache_dir: str | None = key(None, "folder for what was computed of each volume; null = OUTPUT_DIR/cache", flag=True)
    weights_dir: str | None = key(
        None, "folder with pretrained networks' weight files; null = torch hub's cache", flag=True
    )
    real_range: list[float] = key([-1.0, 1.0], "lowest and highest intensity of the real files", interval, flag=True)
    exclude_unreadable: bool = key(
        False, "true: files that can't be read are left out and listed; false: an error", flag=True
    )
    num_resamples: int = key(
        200, "resamples of the bootstrap, for 95 % intervals; at least 20", at_least(20), flag=True
    )
    num_workers: int = key(
        4, "loading processes, at most one per core; 0 = load in the main process", not_negative, flag=True
    )
    seed: int = key(0, "seed of resamples, halvings and pairs", not_negative, flag=True)
    device: str = device_key()


@dataclass
class ReconstructionConfig(EvaluationConfig):
    """How well autoencoders reconstruct volumes that they were not trained on (evaluation/reconstruction.py)."""

    data: str | None = key(None, "folder or dataset JSON of held-out volumes; required", flag=True)
    AE_ckpt: list[str] = key(
        [], "autoencoder checkpoints, e.g. of stage 1 and of stage 2, compared in this order", flag=True
    )
    lpips: str = key(
        "auto", "auto (where VGG-16's weight file is there) | on | off", one_of("auto", "on", "off"), flag=True
    )
    max_memory: float | None = key(None, "GB that decoding may take; null = most of what is free", positive, flag=True)
    num_pictures: int = key(4, "volumes of each class in the pictures", not_negative, flag=True)


@dataclass
class FeatureConfig(EvaluationConfig):
    """What evaluations on features have in common."""

    networks: list[str] = key(
        ["auto"],
        "medicalnet_resnet50, imagenet_resnet50, radimagenet_resnet50, random_3d, random_2d; auto = all whose weight "
        "file is there, random ones in place of what has none",
        known_networks,
        flag=True,
    )
    slices: int = key(
        16, "slices of each plane for networks on slices; all, where a volume has fewer", at_least(1), flag=True
    )
    batch_size: int = key(4, "volumes that go through a network together", at_least(1), flag=True)
    num_halvings: int = key(10, "random halvings of the real set for the floor", at_least(1), flag=True)
    num_pairs: int = key(
        100, "pairs of volumes of each set for the diversity; all, where there are fewer", at_least(1), flag=True
    )


@dataclass
class GenerationMetricsConfig(FeatureConfig):
    """How near generated volumes are to real ones (evaluation/generation_metrics.py)."""

    real: str | None = key(None, "folder or dataset JSON of real volumes that were not trained on; required", flag=True)
    generated: str | None = key(None, "folder (all classes may be in one) or dataset JSON; required", flag=True)
    training: str | None = key(
        None, "folder or dataset JSON of the training volumes; null = no memorisation check", flag=True
    )
    generated_range: list[float] | None = key(
        None,
        "lowest and highest intensity of generated files; null = as the JSON beside each says, else -1 1",
        interval,
        flag=True,
    )
    resample: bool = key(
        False, "brings all volumes to the spacing and size that most real ones of their class have", flag=True
    )
    ignore_spacing: bool = key(
        False, "compares voxels whatever their size in mm and the direction of the axes", flag=True
    )
    neighbours: int = key(5, "nearest neighbours of precision, recall, density and coverage", at_least(1), flag=True)
    num_pictures: int = key(4, "volumes of each set and class in the pictures", not_negative, flag=True)


@dataclass
class ValidityConfig(FeatureConfig):
    """Whether the distances see what they should (evaluation/validity.py)."""

    real: str | None = key(None, "folder or dataset JSON of real volumes; required", flag=True)
    other: str | None = key(
        None, "folder of volumes of another class or modality; null = another class of real", flag=True
    )
    AE_ckpt: str | None = key(
        None, "autoencoder whose reconstructions are to be nearer than other; null = none", flag=True
    )


@dataclass
class ReportConfig:
    """The page of what evaluations found (evaluation/report.py)."""

    input_dir: str | None = key(None, "folder of the results; required", flag=True)
    output: str | None = key(None, "the page; null = report.html in the folder", flag=True)
    title: str = key("3D MedDiffusion: evaluation", "title of the page", flag=True)


@dataclass
class DemoConfig:
    """The whole pipeline on phantoms (evaluation/demo.py)."""

    output_dir: str = key("demo", "folder of the demo", flag=True)
    short: bool = key(False, "a few steps of each stage, figures are not judged", flag=True)


@dataclass
class SamplingStudyConfig:
    """Samplers and numbers of steps on a finished demo (evaluation/sampling_study.py)."""

    demo: str = key("demo", "folder of a finished demo", flag=True)
    output_dir: str | None = key(None, "folder of the results; required", flag=True)
    strategies: list[str] = key([*SAMPLING_STRATEGIES], "samplers", some_samplers, flag=True)
    steps: list[int] = key([5, 10, 15, 25, 50, 100], "of all but ddpm, which takes every timestep", flag=True)
    seeds: list[int] = key([0, 1, 2], "of the noise", some_seeds, flag=True)
    num_samples: int = key(8, "volumes per class, run and seed; a distance needs two", at_least(2), flag=True)
    device: str = device_key()
