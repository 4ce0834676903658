"""What is wrong with the files of a data set: with each by itself, and what shows only among many. Prints nothing."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from dataset.preparation.measured import NotAVolume, check_is_image
from dataset.volumes.geometry import PLAUSIBLE_SPACING, SHEAR, is_plausible_spacing, shear_of
from dataset.volumes.index import LATENT_SUFFIX, VOLUME_SUFFIX, is_size_folder
from dataset.volumes.intensity import RANGE_TOLERANCE, foreground, is_empty, to_model_range
from dataset.volumes.volume_io import Header, NotFiniteError, read_header, read_latent, read_latent_header, read_volume

# Kinds of problems
CLOSED = "folders that cannot be entered"
PASSED_OVER = "image files that training passes over"
UNREADABLE = "unreadable or no volume of one channel"
NOT_FINITE = "NaN or infinite"
OUTSIDE_RANGE = "outside the declared range"
EMPTY = "all background or constant"
UPPER_HALF = "only the upper half of the declared range"
ORIENTATION = "axes not in the order RAS"
MIXED_ORIENTATIONS = "mixed orientations"
NO_ORIENTATION = "no orientation in the header"
CONTRADICTION = "sform and qform disagree"
SPACING = "impossible spacing"
SHEARED = "sheared axes"
COPIES = "the same voxels twice"
LATENT_SIZES = "latents of other sizes"
LATENT_CHANNELS = "latents of other channels"
NOT_NORMALISED = "latents not normalised"
NO_SUBJECT = "no subject"

PREPROCESS = "run dataset/preprocess.py"
ENCODE = "make the latents again with train/generate_training_latent.py"
REMEDIES = {
    CLOSED: "their files are missing here and in training: correct the permissions, or move the folders away",
    PASSED_OVER: f"only *{VOLUME_SUFFIX} is read: {PREPROCESS} on them (other formats as NIfTI), or move them away",
    UNREADABLE: "copy or make the files again, split series and channels into volumes, or leave them out",
    NOT_FINITE: "replace these voxels, e.g. by the background value, or leave the files out",
    OUTSIDE_RANGE: "if all files have this scale, declare it with dataset.intensity_range (--intensity-range), "
    f"otherwise {PREPROCESS}",
    EMPTY: "leave the files out",
    UPPER_HALF: "background would be grey: declare the range that the files have (in Python intensity_range=... of the "
    "data set)",
    ORIENTATION: f"{PREPROCESS}, which turns the axes",
    MIXED_ORIENTATIONS: f"what is left in one file is right or up in another: {PREPROCESS}, which turns the axes",
    NO_ORIENTATION: "left and right are a guess: write the qform or sform, or make the files again from their source",
    CONTRADICTION: "one of them is wrong: set its code to 0, or make the files again from their source",
    SPACING: "correct the headers (unit mm), or make the files again from their source",
    SHEARED: f"{PREPROCESS}, which resamples them",
    COPIES: "keep one of them: copies can be on both sides of the split and count twice",
    LATENT_SIZES: "train on classes of one size",
    LATENT_CHANNELS: f"all latents must come from one autoencoder: {ENCODE}",
    NOT_NORMALISED: ENCODE,
    NO_SUBJECT: "give a --subject-pattern that fits every file, or rename the file",
}
# What the headers tell. Training uses voxels alone, so there it is no mistake.
HEADER_KINDS = (ORIENTATION, MIXED_ORIENTATIONS, NO_ORIENTATION, CONTRADICTION, SPACING, SHEARED)

# Encodings are not quantised, so some lie beyond the codebook's range, which is [-1, 1]. Raw latents do by far.
LATENT_BOUND = 1.05
LATENT_SHARE = 0.05  # of the values may lie beyond


@dataclass(frozen=True)
class Problem:
    """path: the file to blame, None for a whole name. found: what was found there, without the path."""

    kind: str
    found: str
    path: Path | None = None

    def __str__(self) -> str:
        return self.found if self.path is None else f"{self.path}: {self.found}"


@dataclass(frozen=True)
class FileFacts:
    """What a file holds. Of an unreadable one nothing is known but its problems.

    low, high, mean: of all values, as on disk. foreground: share of voxels, None for latents and where the range does
    not fit. digest: equal for equal voxels. mask: why a volume seems to be a label map or mask, "" for an image.
    """

    path: Path
    problems: tuple[Problem, ...]
    header: Header | None = None
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    foreground: float | None = None
    digest: str | None = None
    mask: str = ""


# One file


def examine_volume(path: Path, intensity_range: Sequence[float]) -> FileFacts:
    """Reads a volume whole, and what is wrong with it."""
    try:
        header = read_header(path)
    except UserError as error:
        return FileFacts(path, (_finding(UNREADABLE, path, error),))
    problems = header_problems(header)
    try:
        data = read_volume(path).data  # (1, D, H, W)
    except UserError as error:
        kind = NOT_FINITE if isinstance(error, NotFiniteError) else UNREADABLE
        return FileFacts(path, (*problems, _finding(kind, path, error)), header)
    values = _values(data)
    share = None
    try:
        mapped = to_model_range(data, intensity_range, path)
    except UserError:
        low, high = intensity_range
        found = f"intensities from {values['low']:g} to {values['high']:g}"
        problems.append(Problem(OUTSIDE_RANGE, f"{found} lie outside the declared range [{low:g}, {high:g}]", path))
    else:
        share = float(foreground(mapped).float().mean())
        if is_empty(mapped):
            problems.append(Problem(EMPTY, f"all background (every voxel is {values['high']:g})", path))
    return FileFacts(path, tuple(problems), header, foreground=share, mask=_mask(data), **values)


def _mask(data: torch.Tensor) -> str:
    try:
        check_is_image(data[0].numpy())
    except NotAVolume as reason:
        return str(reason)
    return ""


def examine_latent(path: Path) -> FileFacts:
    """Reads a latent whole, and what is wrong with it."""
    header = None
    try:
        header = read_latent_header(path)
        data = read_latent(path)  # (C, d, h, w)
    except UserError as error:
        kind = NOT_FINITE if isinstance(error, NotFiniteError) else UNREADABLE
        return FileFacts(path, (_finding(kind, path, error),), header)
    values = _values(data)
    problems = []
    if values["low"] == values["high"]:
        problems.append(Problem(EMPTY, f"every value is {values['high']:g}", path))
    share = float((data.abs() > LATENT_BOUND).float().mean())
    if share > LATENT_SHARE:
        extent = f"from {values['low']:g} to {values['high']:g}"
        problems.append(Problem(NOT_NORMALISED, f"values {extent}, {share:.0%} beyond ±{LATENT_BOUND:g}", path))
    return FileFacts(path, tuple(problems), header, **values)


def header_problems(header: Header) -> list[Problem]:
    """What is wrong with the geometry of a volume, by its header."""
    problems = []
    if not header.is_oriented:
        problems.append(Problem(NO_ORIENTATION, header.geometry_fault, header.path))
    elif header.geometry_fault:
        problems.append(Problem(CONTRADICTION, header.geometry_fault, header.path))
    elif header.orientation != "RAS":
        problems.append(Problem(ORIENTATION, f"its axes are {header.orientation}", header.path))
    if not is_plausible_spacing(header.spacing_mm):
        found = f"spacing {format_numbers(header.spacing_mm)} mm is not within {PLAUSIBLE_SPACING}"
        problems.append(Problem(SPACING, found, header.path))
    elif (cosine := shear_of(header.affine)) > SHEAR:
        problems.append(Problem(SHEARED, f"two axes are {90 - np.degrees(np.arccos(cosine)):.1f}° off", header.path))
    return problems


def _values(data: torch.Tensor) -> dict[str, float | str]:
    digest = hashlib.blake2b(repr(tuple(data.shape)).encode(), digest_size=16)
    digest.update(data.contiguous().numpy().data)
    mean = float(data.mean(dtype=torch.float64))
    return {"low": float(data.min()), "high": float(data.max()), "mean": mean, "digest": digest.hexdigest()}


def _finding(kind: str, path: Path, error: UserError) -> Problem:
    """The finding alone: the path is known, and the remedy that ends the message is that of the kind."""
    return Problem(kind, str(error).removeprefix(f"{path}: ").rsplit(": ", 1)[0], path)


# Many files


def file_problems(facts: Mapping[str, Sequence[FileFacts]]) -> list[Problem]:
    """What is wrong with each file by itself."""
    return [problem for files in facts.values() for file in files for problem in file.problems]


def volume_set_problems(facts: Mapping[str, Sequence[FileFacts]], intensity_range: Sequence[float]) -> list[Problem]:
    """What is wrong with the volumes of each name together. facts: name -> its files."""
    problems = []
    for name, files in facts.items():
        codes = Counter(file.header.orientation for file in files if file.header and file.header.is_oriented)
        if len(codes) > 1:
            counts = ", ".join(f"{count} {code}" for code, count in codes.most_common())
            problems.append(Problem(MIXED_ORIENTATIONS, f"{name}: {counts}"))
        if (found := _upper_half(files, intensity_range)) is not None:
            problems.append(Problem(UPPER_HALF, f"{name}: {found}"))
    return problems + copies(facts)


def latent_set_problems(facts: Mapping[str, Sequence[FileFacts]]) -> list[Problem]:
    """Latents of another size or number of channels than most; copies. facts: name -> its files.

    Sizes that are made on purpose, each in a folder of its own (`256x256x256_latents`), are compared within it.
    """
    readable = [file for files in facts.values() for file in files if file.header]
    problems = []
    for kind, part in ((LATENT_SIZES, slice(1, None)), (LATENT_CHANNELS, slice(0, 1))):
        what = "size" if kind == LATENT_SIZES else "channels"
        groups: dict[str, list[FileFacts]] = {}
        for file in readable:
            groups.setdefault(_size_folder_of(file.path) if kind == LATENT_SIZES else "", []).append(file)
        for group in groups.values():
            most = Counter(file.header.latent_shape[part] for file in group).most_common(1)[0][0]
            for file in group:
                if (shape := file.header.latent_shape[part]) != most:
                    text = f"{what} {format_size(shape)}, most have {format_size(most)}"
                    problems.append(Problem(kind, text, file.path))
    return problems + copies(facts)


def latent_set_notes(facts: Mapping[str, Sequence[FileFacts]]) -> list[str]:
    """What is worth knowing of latents and is no problem."""
    readable = [file for files in facts.values() for file in files if file.header]
    sizes = sorted({file.header.latent_shape[1:] for file in readable if _size_folder_of(file.path)})
    if len(sizes) < 2:
        return []
    return [f"latents of {', '.join(map(format_size, sizes))}: train on one, with a JSON of its folders alone"]


def _size_folder_of(path: Path) -> str:
    """The folder of one size of a class that a latent lies in; "" outside of any."""
    names = (parent.name.removesuffix(LATENT_SUFFIX) for parent in path.parents)
    return next(filter(is_size_folder, names), "")


def copies(facts: Mapping[str, Sequence[FileFacts]]) -> list[Problem]:
    """Files whose voxels are those of an earlier file."""
    first: dict[str, tuple[str, Path]] = {}
    problems = []
    for name, files in facts.items():
        for file in (file for file in files if file.digest is not None):
            of, path = first.setdefault(file.digest, (name, file.path))
            if (of, path) != (name, file.path):
                where = f", one under {of}, one under {name}" if of != name else ""
                problems.append(Problem(COPIES, f"the same voxels as {path}{where}", file.path))
    return problems


def _upper_half(files: Sequence[FileFacts], intensity_range: Sequence[float]) -> str | None:
    """The finding where no file of a name uses the lower half of the declared range; else None."""
    low, high = intensity_range
    middle = (low + high) / 2
    sound = [file for file in files if file.foreground is not None and file.low < file.high]
    if not sound or min(file.low for file in sound) < middle - RANGE_TOLERANCE * (high - low):
        return None
    lowest, highest = min(file.low for file in sound), max(file.high for file in sound)
    return (
        f"intensities from {lowest:g} to {highest:g}, only the upper half of the declared range [{low:g}, {high:g}], "
        f"dataset.intensity_range=[{middle:g},{high:g}] fits (--intensity-range {middle:g} {high:g})"
    )


def volume_set_warnings(facts: Mapping[str, Sequence[FileFacts]]) -> list[str]:
    """What is wrong in all likelihood, and may be meant. facts: name -> its files."""
    warnings = []
    for name, files in facts.items():
        if masks := [file for file in files if file.mask]:
            found = f"{len(masks)} of {len(files)} files have few distinct values, e.g. {masks[0].path}"
            warnings.append(f"{name}: {found}: {masks[0].mask}; leave them out if images are to be learned")
    return warnings


def volume_set_notes(facts: Mapping[str, Sequence[FileFacts]], patch_size: int, whose: str = "") -> list[str]:
    """What is worth knowing of the volumes of each name and is no problem. whose: patches of that size, in words."""
    notes = []
    for name, files in facts.items():
        headers = [file.header for file in files if file.header]
        small = sum(min(header.shape) < patch_size for header in headers)
        uneven = sum(any(extent % patch_size for extent in header.shape) for header in headers)
        if small:
            notes.append(f"{name}: {small} smaller than a patch of {patch_size}{whose}: padded with background")
        if uneven:
            where = "padded in validation and encoding"
            notes.append(f"{name}: {uneven} do not divide into patches of {patch_size}{whose}: {where}")
        for note, count in Counter(note for header in headers for note in header.notes).items():
            notes.append(f"{name}: {count} headers: {note}")
        if (sizes := len({header.shape for header in headers})) > 1:
            notes.append(f"{name}: {sizes} sizes: train_BiFlowNet_MultiRes.py takes them all, _SingleRes.py one")
        if (spacings := len({format_numbers(header.spacing_mm) for header in headers})) > 1:
            notes.append(f"{name}: {spacings} spacings: without spacing as an attribute the model knows nothing of it")
    return notes


# A few files


def choose_sample(files: Mapping[str, Sequence[Path]], count: int) -> Iterator[tuple[str, Path]]:
    """At most `count` files (name, path), spread over the names and over the files of each; always the same."""
    names = _spread(list(files), count)
    for i, name in enumerate(names):
        share = count // len(names) + (i < count % len(names))
        for path in _spread(files[name], share):
            yield name, path


def _spread(items: Sequence, count: int) -> list:
    """At most `count` items, evenly from the first to the last."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def holds_latents(sample: Sequence[Path]) -> bool:
    """Whether most of some files are 4D, as latents are, by their headers. Unreadable ones are passed over."""
    dimensions = []
    for path in sample:
        with suppress(UserError):
            dimensions.append(len(read_latent_header(path).shape))
    return 2 * sum(count > 3 for count in dimensions) > len(dimensions)


def by_kind(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """Problems sorted by kind, in the order of `REMEDIES`."""
    kinds = {kind: [problem for problem in problems if problem.kind == kind] for kind in REMEDIES}
    return {kind: found for kind, found in kinds.items() if found}


def format_size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def format_numbers(numbers: Sequence[float]) -> str:
    """Lengths in mm as "0.7×0.7×2.5", to three digits."""
    return "×".join(f"{number:.3g}" if isfinite(number) else str(number) for number in numbers)
