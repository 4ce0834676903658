"""Options of preprocessing, of the check of a data set and of phantoms, and the class table."""

import os
from dataclasses import dataclass
from typing import Any

from config.schema.option import flag, key, shard
from config.schema.rules import (
    Rule,
    at_least,
    below_one,
    between,
    fits_into_memory,
    inner_share,
    interval,
    name_of_a,
    not_negative,
    one_of,
    positive,
    positive_triple,
    regex,
    share,
    workers,
)

# BiFlowNet cuts latents into sub-volumes of this edge.
SUB_VOLUME = 8
LARGEST_SIDE = 32_767  # voxels along an axis of a NIfTI-1 file
SMALLEST_SPACING_MM, LARGEST_SPACING_MM = 0.05, 20.0  # those of dataset/volumes/geometry.py
WORK_BYTES = 16  # a voxel while it is resampled: in float64, and as float32 before and after
MASKS = ("gaussian", "equispaced", "poisson")  # those of dataset/degradation/operators.py
_SIDES = str.maketrans("LPI", "RAS")


def is_grid(value: list[int]) -> bool:
    """Whether BiFlowNet can take a latent of this size."""
    return len(value) == 3 and all(0 < size <= LARGEST_SIDE // 8 and size % SUB_VOLUME == 0 for size in value)


latent_grids = Rule(
    lambda grids: grids and all(map(is_grid, grids)), f"a list of grids, each three positive multiples of {SUB_VOLUME}"
)
voxel_sizes = Rule(
    lambda rows: all(len(row) == 3 and min(row) > 0 for row in rows), "a list of spacings, each three numbers above 0"
)
latent_grid = Rule(is_grid, f"three positive multiples of {SUB_VOLUME}")
of_scans = Rule(
    lambda value: len(value) == 3 and all(SMALLEST_SPACING_MM <= length <= LARGEST_SPACING_MM for length in value),
    f"three numbers from {SMALLEST_SPACING_MM:g} to {LARGEST_SPACING_MM:g}, x y z in mm",
)
voxel_size = positive_triple("three numbers above 0, x y z in mm")
orientation = Rule(
    lambda value: sorted(value.translate(_SIDES)) == [*"ARS"], "three letters, one each of L/R, P/A and I/S"
)
percent = Rule(lambda value: 0 <= min(value) and max(value) <= 100, "between 0 and 100")
free_name = Rule(
    lambda value: not value.endswith(("_latents", "_cache")),
    "a name that doesn't end like a folder of latents or of the cache",
)


def class_table_flag() -> Any:
    """Of preprocessing and generation: one file serves both."""
    return flag(
        None, "YAML file with `downsample` and `classes`, as config/classes_8x.yaml; null = the config's own table"
    )


@dataclass
class VolumeClass:
    """One row of the class table: what a class id stands for and in which sizes its volumes are made."""

    id: int = key(0, "class id", at_least(0))
    name: str = key("", "name of its folder, and the start of the file names of generated volumes", name_of_a("file"))
    modality: str | None = key(None, "CT | MR: how preprocessing maps its intensities; null = MR", one_of("CT", "MR"))
    grids: list[list[int]] = key([], "latent grids (z, x, y), one volume each", latent_grids)
    spacings_mm: list[list[float]] = key([], "voxel spacing (x, y, z) in mm, one per grid", voxel_sizes)


@dataclass
class PreprocessConfig:
    """Preparation of NIfTI files and DICOM series for training (dataset/preprocess.py)."""

    input: str | None = flag(None, "folder with NIfTI files or DICOM series, at any depth; required", section="Files")
    output_dir: str | None = flag(None, "folder that gets NAME/SIZE with the volumes, and the dataset JSONs; required")
    preset: str | None = flag(
        None, "class of the table: its name, id, modality, size and spacing. NAME is its first size, NAME_XxYxZ any"
    )
    name: str | None = flag(None, "name of class and folder; null = the preset's", name_of_a("folder"), free_name)
    class_id: int | None = flag(None, "class id; null = the preset's, else the next free one", not_negative)
    select: str | None = flag(None, "regular expression that path or series description must contain (any case)", regex)
    exclude: str | None = flag(None, "regular expression that neither may contain (any case)", regex)
    assume_orientation: str | None = flag(
        None, "axes of NIfTI files that don't say theirs, e.g. LPS; null = such files are refused", orientation
    )

    spacing: list[float] | None = flag(
        None, "voxel size x y z in mm; null = the preset's, without preset as it is", of_scans, section="Geometry"
    )
    size: list[int] | None = flag(
        None,
        "voxels x y z, cropped around the foreground or padded; null = the preset's, without preset see multiple",
        positive_triple(f"three numbers above 0 and up to {LARGEST_SIDE:,}, x y z in voxels", LARGEST_SIDE),
        fits_into_memory(WORK_BYTES),
    )
    multiple: int = flag(
        64, "without size: axes are padded to the next multiple; the autoencoder's patch", between(1, 512)
    )
    interpolation: str = flag("linear", "linear | bspline", one_of("linear", "bspline"))

    modality: str | None = flag(
        None,
        "CT | MR; of DICOM series only those of it are taken; null = the preset's",
        one_of("CT", "MR"),
        section="Intensities",
    )
    window: list[float] | None = flag(
        None, "lowest and highest value, mapped to -1 and 1; null = -1000 1000 HU for CT without percentiles", interval
    )
    percentiles: list[float] | None = flag(
        None, "percentiles of each volume, mapped to -1 and 1; null = 0.5 99.5 for MR without window", interval, percent
    )

    subject_pattern: str | None = flag(
        None,
        "regular expression that finds the subject in a volume's path below the input; with it, or a share, "
        "split.json is drawn beside the dataset JSONs (dataset/split.py). One that is there gets the new subjects",
        regex,
        section="Split",
    )
    validation: float | None = flag(None, "share of the volumes for validation; null = 0.1 if drawn", below_one)
    held_out: float | None = flag(None, "share held out from all training; null = 0.1 if drawn", below_one)

    num_workers: int = flag(4, "processes, at most one per core; 0 = the main process", workers, section="Run")
    shard: str | None = shard()
    dry_run: bool = flag(False, "list what is found, write nothing")

    class_table: str | None = class_table_flag()
    downsample: int = key(8, "image voxels per latent voxel of the class table's grids: 8 | 4", one_of(8, 4))
    classes: list[VolumeClass] = key([], "what the presets are: id, name, modality, grids and spacings of each class")


@dataclass
class CheckConfig:
    """Check of a data set before it costs training time (dataset/check.py)."""

    json: str | None = key(None, "dataset JSON: name or class id -> folder(s)", flag="JSON")
    intensity_range: list[float] = flag([-1.0, 1.0], "lowest and highest intensity of the files", interval)
    patch_size: int = flag(
        64,
        "edge of a patch, for notes; 64 = that of the latents, where there are any",
        between(1, 512, "the largest volumes"),
    )
    subject_pattern: str | None = flag(None, "regular expression, as dataset.subject_pattern", regex)
    num_workers: int = flag(min(8, os.cpu_count() or 1), "processes that read; 0 = this one", workers)
    seed: int = flag(0, "seed of the choice of pictures", not_negative)
    num_pictures: int = flag(6, "volumes drawn; 0 = no picture", between(0, 1000))
    picture: str | None = flag(None, "PNG file; null = NAME_check.png beside NAME.json")
    report: str | None = flag(None, "JSON file that gets all of it, every file named")


@dataclass
class SplitConfig:
    """Draws the side of every subject of a data set: training, validation or held out (dataset/split.py)."""

    json: str | None = key(None, "dataset JSON: name or class id -> folder(s) of volumes", flag="JSON")
    subject_pattern: str | None = flag(
        None,
        "regular expression that finds a file's subject in its path below its folder: its first group, or all of it; "
        "null = that of split.json; without one each file is a subject",
        regex,
    )
    validation: float | None = flag(None, "share for validation; null = that of split.json, else 0.1", below_one)
    held_out: float | None = flag(None, "share that no training sees; null = that of split.json, else 0.1", below_one)
    seed: int | None = flag(None, "seed of the draw; null = that of split.json, else 0", not_negative)
    anew: bool = flag(False, "draw all subjects again, also where split.json has other values")


@dataclass
class PhantomConfig:
    """Digital phantoms (dataset/phantoms.py)."""

    output_dir: str | None = flag(None, "folder of the data set; required")
    num_per_class: int = flag(40, "phantoms of each class to train on", between(1, 100_000))
    num_validation: int = flag(4, "more of each class, for validation", between(0, 100_000))
    num_held_out: int = flag(16, "more of each class, held out from all training", between(0, 100_000))
    slabs: float = flag(0.0, "chests of half the height beside them, as a share of each number above", share)
    size: int = flag(64, "voxels along each axis", between(16, 1024))
    seed: int = flag(0, "seed of anatomy, intensities, texture and spacing", not_negative)
    num_workers: int = flag(4, "processes, at most one per core; 0 = the main process", workers)


@dataclass
class DegradeConfig:
    """Condition volumes with their measurements (dataset/degrade.py)."""

    data_path: str | None = flag(None, "JSON: class id -> folder of prepared volumes, in [-1, 1]; required")
    output_dir: str | None = flag(None, "folder that gets CLASS/NAME.nii.gz, and three JSONs; required")
    operator: str | None = flag(
        None, "ct | mri | thick | inpaint | contrast; required", one_of("ct", "mri", "thick", "inpaint", "contrast")
    )
    classes: list[int] = flag([], "class ids; empty = all")
    seed: int = flag(0, "seed of noise, masks and boxes", not_negative)
    num_workers: int = flag(4, "processes, at most one per core; 0 = the main process", workers)
    views: int = flag(16, "ct: views", between(1, 100_000))
    arc: float = flag(180.0, "ct: degrees that they cover", positive)
    photons: float = flag(0.0, "ct: expected on a detector without a patient; 0 = no noise", not_negative)
    window: list[float] = flag([-1000.0, 1000.0], "ct: HU of the volumes' -1 and 1", interval)
    acceleration: float = flag(6.0, "mri: one of how many lines is measured", at_least(1))
    mask: str = flag("gaussian", "mri: gaussian | equispaced lines | poisson discs", one_of(*MASKS))
    noise: float = flag(0.0, "mri: standard deviation of k-space's noise, of images from 0 to 1", not_negative)
    factor: int = flag(4, "thick: how many times as thick slices are", at_least(2))
    axis: str = flag("z", "thick: axis across the slices, x | y | z", one_of("x", "y", "z"))
    others: list[str] = flag([], "contrast: folders of prepared volumes of the other contrast")
    pattern: str | None = flag(None, "contrast: regular expression that finds the study in a path of both", regex)
    box: float = flag(0.4, "inpaint: sides of the missing box, as a share of the volume's", inner_share)
