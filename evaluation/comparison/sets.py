"""The volumes that are compared: real, generated and training ones by class, and whether they can be compared at all.

A set is given as a folder, all of whose `*.nii.gz` are one class, or as a dataset JSON (class id or name -> folder).
Generated volumes may also lie in one folder for all classes: the JSON beside each tells its class.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from common.errors import UserError
from common.files import file_sha256
from common.places import exists, is_folder
from common.progress import tracked
from dataset.checking.examine import format_numbers, format_size
from dataset.order.data_split import dataset_of, files_of_side, parse_side
from dataset.order.subjects import Subjects, find_subjects
from dataset.preparation.recipe import Recipe, prepare
from dataset.preparation.sources import Scan
from dataset.volumes.index import class_folder, list_volumes, read_dataset_folders, read_dataset_json
from dataset.volumes.intensity import MODEL_RANGE, check_intensity_range, to_model_range
from dataset.volumes.volume_io import Header, nifti_to_tensor, read_header, read_volume, tensor_to_nifti
from evaluation.generation.record import read_record
from evaluation.metrics.units import Units
from evaluation.results.results import Warned

Range = Sequence[float]  # lowest and highest intensity
ALL = "all classes"  # the name of all groups together
SAME_SPACING = 0.01  # relative difference that rounding and class tables make
MIN_VOLUMES = 2  # of a set, of two subjects: a covariance, and a pair
MOST_SHOWN = 5  # files in a message
OTHER_RANGE = (
    "if all files have this scale, declare it (real_range=[{found_low:g},{found_high:g}], or generated_range for "
    "generated ones); otherwise rescale the file to [{low:g}, {high:g}]"
)


@dataclass(frozen=True)
class Grid:
    """Voxels (X, Y, Z), their size in mm and where the axes point ("" where the header doesn't say)."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    orientation: str

    @classmethod
    def of(cls, header: Header) -> "Grid":
        return cls(header.shape, header.spacing_mm, header.orientation if header.is_oriented else "")

    def in_ras(self) -> "Grid":
        """The same voxels once their axes are in the order right, front, head, as preprocessing leaves them."""
        if "?" in self.orientation or not self.orientation:
            return self
        axes = np.argsort(nib.orientations.axcodes2ornt(tuple(self.orientation))[:, 0]).tolist()
        return Grid(*(tuple(values[axis] for axis in axes) for values in (self.shape, self.spacing_mm)), "RAS")

    def fits(self, other: "Grid", ignore_spacing: bool = False) -> bool:
        """Whether volumes on both can be compared voxel by voxel. An unknown orientation fits every one."""
        if ignore_spacing:
            return self.shape == other.shape
        sides = zip(self.spacing_mm, other.spacing_mm, strict=True)
        same_spacing = all(abs(a - b) <= SAME_SPACING * max(abs(a), abs(b)) for a, b in sides)
        same_axes = self.orientation == other.orientation or not (self.orientation and other.orientation)
        return self.shape == other.shape and same_spacing and same_axes

    def __str__(self) -> str:
        return f"{format_size(self.shape)} voxels of {format_numbers(self.spacing_mm)} mm {self.orientation}".rstrip()


@dataclass(frozen=True)
class SetVolume:
    """One file of a set.

    intensity_range: its lowest and highest value. resample: the grid it is brought to. is_range_stated: whether the
    range was said for this file, and not assumed. subject: whose it is, where a file can share that with others.
    """

    path: Path
    intensity_range: tuple[float, float] = MODEL_RANGE
    resample: Grid | None = None
    is_range_stated: bool = False
    subject: str | None = None

    def key(self) -> str:
        """Equal for volumes that give the same voxels: hash of the file and of how it is read."""
        how = [file_sha256(self.path), self.intensity_range]
        how += [] if self.resample is None else [self.resample.shape, self.resample.spacing_mm]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def read(self) -> torch.Tensor:
        """(1, D, H, W) float32 in [-1, 1]. UserError: as `read_volume`, and values outside `intensity_range`."""
        volume = read_volume(self.path)
        data = to_model_range(volume.data, self.intensity_range, self.path, OTHER_RANGE)
        if self.resample is None:
            return data
        # The way that training data are brought to a spacing and size, so that both sets get the same.
        recipe = Recipe(window=MODEL_RANGE, spacing_mm=self.resample.spacing_mm, size=self.resample.shape)
        try:
            prepared = prepare(Scan(tensor_to_nifti(data[0]).numpy(), volume.affine), recipe).data  # (X, Y, Z)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from error
        return nifti_to_tensor(torch.from_numpy(prepared))[None].contiguous()


@dataclass(frozen=True)
class Group:
    """The volumes of one class, by role: real, generated, training."""

    name: str
    sets: Mapping[str, tuple[SetVolume, ...]] = field(default_factory=dict)


def list_set(path: str | Path, option: str) -> dict[str, list[Path]]:
    """Files of a folder, under "" , of each name of a dataset JSON, or with JSON:SIDE those on one side of its split.

    UserError names the option.
    """
    try:
        json_file, side = parse_side(str(path))
        if side is not None and not exists(path):
            return files_of_side(json_file, side)
        if not exists(path):
            raise UserError(f"{path}: no such folder or dataset JSON")
        return {"": list_volumes(path)} if is_folder(path) else read_dataset_json(path)
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def units_of(*classes: Sequence[SetVolume]) -> Units:
    """The subjects of the volumes of some classes, class after class."""
    return Units.of(*([volume.subject for volume in volumes] for volumes in classes))


def groups_of_one_set(
    path: str, option: str, role: str, folder_name: str, intensity_range: Range, subject_pattern: str | None
) -> tuple[list[Group], list[str]]:
    """The classes of a dataset JSON, or a folder as one class `folder_name`, each with the one set `role`; and notes.

    UserError names the option.
    """
    intensity_range = check_intensity_range(intensity_range)
    classes = list_set(path, option)
    titles = class_titles(path)
    subjects = find_subjects({option: (path, _all_of(classes))}, subject_pattern)
    groups = [
        Group(titles.get(name, folder_name), {role: _real_volumes(files, intensity_range, subjects.of[option])})
        for name, files in classes.items()
    ]
    return groups, _subject_notes(subjects)


def _all_of(classes: Mapping[str, Sequence[Path]]) -> list[Path]:
    return list(dict.fromkeys(file for files in classes.values() for file in files))


def _real_volumes(files: Sequence[Path], intensity_range: Range, subjects: Mapping[Path, str]) -> tuple[SetVolume, ...]:
    return tuple(SetVolume(path, intensity_range, subject=subjects.get(path)) for path in files)


def _subject_notes(subjects: Subjects) -> list[str]:
    """A warning of files that count as subjects, but are probably several scans of one."""
    if (shared := subjects.shared) is None:
        return []
    found = f"{shared.num_files} files have {shared.num_names} names, {' and '.join(map(str, shared.example))} the same"
    meaning = (
        ", but each counts as a subject of its own: if these names are subjects, say so with --subject-pattern "
        f"'{shared.pattern}' (and draw a split.json anew with it), since intervals are too narrow otherwise, floors "
        "too low, and real volumes of training subjects hide memorisation"
    )
    return [Warned("subjects", found, meaning)]


def class_titles(path: str | Path) -> dict[str, str]:
    """What the classes of a dataset JSON are called for people, by their names there; of a folder there are none.

    An id stands for the folder of its volumes, NAME or NAME/SIZE, where these have one name. No title comes twice, and
    none is that of all classes together.
    """
    titles: dict[str, str] = {}
    path = dataset_of(str(path))
    for name, folders in ({} if is_folder(path) else read_dataset_folders(path)).items():
        found = {class_folder(place).name for place in map(Path.resolve, folders)}
        title = found.pop() if name.isdigit() and len(found) == 1 else name
        titles[name] = f"{title} ({name})" if title in (ALL, *titles.values()) else title
    return titles


def group_volumes(
    real: str,
    generated: str,
    training: str | None,
    real_range: Range,
    generated_range: Range | None,
    subject_pattern: str | None,
) -> tuple[list[Group], list[str]]:
    """The sets of every class, and notes on classes that are left out.

    real, generated, training: folder or dataset JSON each; training may be None. real_range: intensities of real and
    training volumes. generated_range: of generated ones; None: as the JSON beside each says, else [-1, 1].
    subject_pattern: as `find_subjects` takes it, for real and training volumes; generated ones are nobody's.

    Raises UserError: missing folders, names that don't fit together, a class that can't be told, fewer than two
    volumes or subjects in a set, a file or subject in two sets.
    """
    real_range = check_intensity_range(real_range)
    real_files = list_set(real, "real")
    classes = _generated_by_class(generated, set(real_files))
    training_files = None if training is None else list_set(training, "training")
    if training_files is not None and not real_files.keys() <= training_files.keys():
        raise UserError(
            f"training: {training} has {_names(training_files)}, real {_names(real_files)}: give the same names, "
            "both as dataset JSONs or both as folders"
        )
    both = {"real": (real, _all_of(real_files))}
    both |= {} if training is None else {"training": (training, _all_of(training_files))}
    subjects = find_subjects(both, subject_pattern)
    if not classes.keys() & real_files.keys():
        raise UserError(f"generated: {generated} has {_names(classes)}, real {_names(real_files)}: no class is in both")
    groups, notes, titles = [], _subject_notes(subjects), class_titles(real)
    for name, files in real_files.items():
        if name not in classes:
            notes.append(Warned(f"class {name}", "there are no generated volumes of it", ", left out"))
            continue
        title, volumes = classes[name]
        title = titles.get(name, title) if title == name else title
        sets = {"real": _real_volumes(files, real_range, subjects.of["real"])}
        sets["generated"] = tuple(_with_range(path, generated_range) for path in volumes)
        if training_files is not None:
            sets["training"] = _real_volumes(training_files[name], real_range, subjects.of["training"])
        if title in [ALL, *(group.name for group in groups)]:
            title = f"{title} ({name})"
        group = Group(title or name or Path(real).name, sets)
        _check_group(group)
        groups.append(group)
    if strange := sorted(classes.keys() - real_files.keys()):
        notes.append(f"generated volumes of {_names(strange)} are left out: there are no real ones of them")
    return groups, notes


def _generated_by_class(path: str, real_names: set[str]) -> dict[str, tuple[str, list[Path]]]:
    """Name as in the real set -> (name for people, files)."""
    files = list_set(path, "generated")
    if not is_folder(path):
        return {name: (name, of_name) for name, of_name in files.items()}
    records = {file: read_record(file) or {} for file in files[""]}
    if real_names == {""}:
        names = sorted({str(record["class_name"]) for record in records.values() if "class_name" in record})
        if len(names) > 1:
            raise UserError(
                f"generated: {path} holds the classes {', '.join(names)}, real is one folder: give real (and training) "
                "as a dataset JSON with these names or their ids, or the folder of one class"
            )
        return {"": (names[0] if names else "", files[""])}
    by_id = all(name.isdigit() for name in real_names)
    found: dict[str, tuple[str, list[Path]]] = {}
    for file, record in records.items():
        if "class_id" not in record or "class_name" not in record:
            raise UserError(
                f"{file}: of which class it is can't be told, no JSON of the generation scripts lies beside it: give "
                "generated as a dataset JSON with the names of the real one, or both as a folder"
            )
        name = str(record["class_id"] if by_id else record["class_name"])
        found.setdefault(name, (str(record["class_name"]), []))[1].append(file)
    return found


def _with_range(path: Path, given: Range | None) -> SetVolume:
    if given is not None:
        return SetVolume(path, check_intensity_range(given), is_range_stated=True)
    record = read_record(path) or {}
    intensity = record.get("intensity", {})
    if intensity is None:  # written as it was generated
        return SetVolume(path, is_range_stated=True)
    try:
        stated = check_intensity_range((float(intensity["low"]), float(intensity["high"])))
    except (KeyError, TypeError, ValueError):  # UserError is a ValueError
        return SetVolume(path)
    return SetVolume(path, stated, is_range_stated=True)


def _check_group(group: Group) -> None:
    for role, volumes in group.sets.items():
        if len(volumes) < MIN_VOLUMES:
            raise UserError(f"{group.name}: {len(volumes)} {role} volume, at least {MIN_VOLUMES} are needed")
        if role == "real" and units_of(volumes).num_subjects < MIN_VOLUMES:
            raise UserError(f"{group.name}: {len(volumes)} {role} volumes are of one subject, 2 or more are needed")
    places: dict[Path, str] = {}
    for role, volumes in group.sets.items():
        for volume in volumes:
            other = places.setdefault(volume.path.resolve(), role)
            if other != role:
                raise UserError(f"{volume.path}: is both a {other} and a {role} volume: sets must not share files")


# ------------------------------------------------------------------------------------------------------------ geometry


def read_headers(groups: Sequence[Group]) -> tuple[dict[Path, Grid], dict[Path, str]]:
    """The grid of every file, and why those without one can't be read."""
    grids, problems = {}, {}
    paths = dict.fromkeys(v.path for group in groups for volumes in group.sets.values() for v in volumes)
    for path in tracked(paths, "reading headers", "file", transient=True):
        try:
            grids[path] = Grid.of(read_header(path))
        except UserError as error:
            problems[path] = str(error)
    return grids, problems


def read_groups(groups: Sequence[Group], exclude: bool) -> tuple[list[Group], dict[Path, Grid], dict[Path, str]]:
    """The groups, the grid of every file, and with `exclude` the files that were left out and why.

    UserError: headers that can't be read, all in one, unless `exclude`; too few volumes are left.
    """
    grids, problems = read_headers(groups)
    if problems:
        check_refused(problems, len(grids) + len(problems), "volumes", exclude)
    return without(groups, set(problems)), grids, problems


def without(groups: Sequence[Group], paths: set[Path]) -> list[Group]:
    """The groups without some files. UserError where too few are left."""
    left = []
    for group in groups:
        sets = {role: tuple(v for v in volumes if v.path not in paths) for role, volumes in group.sets.items()}
        left.append(replace(group, sets=sets))
        _check_group(left[-1])
    return left


def on_one_grid(
    groups: Sequence[Group], grids: Mapping[Path, Grid], resample: bool, ignore_spacing: bool = False
) -> list[Group]:
    """The groups, with `resample` on the grid that most real volumes of each have.

    A class whose real and generated volumes have the same several sizes becomes a group of each size.

    UserError: without `resample`, for volumes of a group that differ in size or, unless that is to be ignored, spacing
    or orientation.
    """
    result = []
    for group in groups if resample else [part for whole in groups for part in _by_size(whole, grids)]:
        wanted = Counter(grids[volume.path] for volume in group.sets["real"]).most_common(1)[0][0]
        if resample:
            sets = {role: tuple(replace(v, resample=wanted.in_ras()) for v in vs) for role, vs in group.sets.items()}
            result.append(replace(group, sets=sets))
            continue
        found = []
        for role, volumes in group.sets.items():
            others = Counter(grid for v in volumes if not wanted.fits(grid := grids[v.path], ignore_spacing))
            found += [f"{count} {role} of {grid}" for grid, count in others.most_common(2)]
        if found:
            raise UserError(
                f"{group.name}: most real volumes have {wanted}, but there are {', '.join(found)}: --resample brings "
                "all to the grid of most real ones, --ignore-spacing compares voxels where only mm or axes differ"
            )
        result.append(group)
    return result


def _by_size(group: Group, grids: Mapping[Path, Grid]) -> list[Group]:
    """The group, or one of each size where its real and generated volumes have the same ones."""
    sizes = {role: {grids[volume.path].shape for volume in volumes} for role, volumes in group.sets.items()}
    if len(sizes["real"]) == 1 or sizes["real"] != sizes["generated"]:
        return [group]
    parts = []
    for size in sorted(sizes["real"]):
        sets = {role: tuple(v for v in vs if grids[v.path].shape == size) for role, vs in group.sets.items()}
        parts.append(Group(f"{group.name} {format_size(size)}", sets))
        _check_group(parts[-1])
    return parts


def list_refused(refused: Mapping[Any, str], what: str) -> str:
    """One line on files that can't be read, the first few with the reason, which names them."""
    shown = "; ".join(list(refused.values())[:MOST_SHOWN])
    more = f"; and {len(refused) - MOST_SHOWN} more" if len(refused) > MOST_SHOWN else ""
    return f"{len(refused)} {what} can't be read: {shown}{more}"


def check_refused(reasons: dict[Path, str], count: int, what: str, exclude: bool) -> None:
    """UserError for volumes that can't be read, unless they are to be left out and two of `count` remain."""
    if reasons and not exclude:
        raise UserError(f"{list_refused(reasons, what)}; replace them, or leave them out with --exclude-unreadable")
    if count - len(reasons) < 2:
        raise UserError(f"{list_refused(reasons, what)}; at least 2 are needed")


def _names(names) -> str:
    return ", ".join(f'"{name}"' for name in names if name) or "one set without a name"
