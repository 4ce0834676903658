"""DICOM series as volumes: which images belong together, and whether they are an even stack; by their headers alone.

Patient coordinates of DICOM are LPS in mm; affines here are RAS, as in NIfTI.
"""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from dataset.preparation.dicom_header import Slice
from dataset.preparation.dicom_places import (
    MIN_SLICES,
    are_copies,
    directions_of,
    group_by_position,
    has_no_position_twice,
    is_even,
    normal_of,
    place_of,
    step_of,
    unevenness,
)
from dataset.preparation.measured import NotAVolume

SAME_PIXEL_SPACING = 1e-3  # relative; a smaller difference is rounding
UNIT_TOLERANCE = 0.02  # of a direction's length and of the cosine between two; what is less is rounding
SMALL_DRIFT = 0.1  # voxels over a whole stack; more is a tilt, however small
SHEAR_TOLERANCE_DEG = 0.5  # a smaller angle between slice direction and slice normal is rounding
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
HOUNSFIELD = ("", "HU", "US")  # of CT: not said, said, and "unspecified"; values are checked in any case
ECHO, KERNEL = attrgetter("echo_time"), attrgetter("kernel")
# What tells images of one series apart that are volumes of their own: echoes, water and fat, exports in which different
# people's series got the same identifier, phases, reconstructions. Echo and kernel do so even where all positions
# together are an even stack; the others may differ within a volume.
SPLITS: tuple[Callable[[Slice], Any], ...] = (
    ECHO,
    lambda image: image.image_type,
    lambda image: (image.echo_time, image.image_type),
    lambda image: image.path.parent,
    lambda image: image.acquisition,
    KERNEL,
    lambda image: (image.number, image.description),
)


@dataclass(frozen=True)
class Series:
    """The images of one series that lie in one stack.

    folder: the one that holds all of them. slices: in the order of their position where it is known.
    kind: what tells it from others of the same identifier, beyond what `key` has in any case.
    notes: what was found on the way. label: folder and description, for messages and selection.
    """

    folder: Path
    slices: tuple[Slice, ...]
    kind: tuple = ()
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return self.slices[0].description

    @property
    def modality(self) -> str:
        return self.slices[0].modality

    @property
    def files(self) -> tuple[Path, ...]:
        return _files_of(self.slices)

    @property
    def label(self) -> str:
        return f"{self.folder} [series {self.slices[0].number} {self.description}]".replace(" ]", "]")

    @property
    def key(self) -> str:
        """Eight characters that tell this stack from all others, whatever the names of its files."""
        first = self.slices[0]
        turned = None if first.orientation is None else [round(x, 1) + 0.0 for x in first.orientation]
        parts = (first.series_uid, *_stack_key(first), turned, first.echo_time, first.image_type, *self.kind)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


# Which images belong together


def group_series(slices: Iterable[Slice]) -> list[Series]:
    """Sorts images into stacks: by patient, study and series, and within one by size, orientation and purpose.

    Identifiers that say nothing (missing, or one for every image) give way to folder, number and description of the
    series. A series that holds different images of each position (see SPLITS) gives a stack for each kind. Patient
    and study enter the key only where identifier and folder don't tell people apart, so that a person who comes into a
    folder of their own renames nobody.
    """
    series = []
    for images in _by_identifier(slices):
        found = [
            (person, Series(_common_folder(part), tuple(part), kind))
            for person, own in _tell_apart(images).items()
            for stack in _stacks(own)
            for kind, part in _split(sorted(stack, key=place_of))
        ]
        people = defaultdict(set)
        for person, one in found:
            people[one.folder, one.key].add(person)
        for person, one in found:
            is_named = images[0].series_uid and len(people[one.folder, one.key]) == 1
            series.append(one if is_named else replace(one, kind=(*person, *one.kind)))
    return sorted(series, key=lambda one: (str(one.folder), one.slices[0].number, one.key))


def _by_identifier(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Images by series identifier. Where it says nothing, those that could be the slices of one volume together."""
    by_uid, alike = defaultdict(list), defaultdict(list)
    for image in slices:
        by_uid[image.series_uid].append(image)
    for uid, images in by_uid.items():
        for image in images if not uid or len(images) == 1 else ():
            place = (image.path.parent, image.patient, image.number, image.description)
            alike[*place, _stack_key(image)].append(image)
    joined = [images for images in alike.values() if len(images) >= MIN_SLICES and has_no_position_twice(images)]
    taken = {id(image) for images in joined for image in images}
    left = [[image for image in images if id(image) not in taken] for images in by_uid.values()]
    return [images for images in left if images] + [
        [replace(image, series_uid="") for image in images] for images in joined
    ]


def _tell_apart(images: Sequence[Slice]) -> dict[tuple, list[Slice]]:
    """Images of one series identifier by patient and study; a study of a few images is an identifier for each."""
    studies = Counter(image.study for image in images)
    people = defaultdict(list)
    for image in images:
        people[image.patient, image.study if studies[image.study] >= MIN_SLICES else ""].append(image)
    return people


def _stacks(images: Iterable[Slice]) -> list[list[Slice]]:
    """Images by size and purpose, and those of one orientation together."""
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)
    for image in images:
        alike = groups[_stack_key(image)]
        stack = next((stack for stack in alike if _is_parallel(stack[0], image)), None)
        if stack is None:
            alike.append([image])
        else:
            stack.append(image)
    return [stack for alike in groups.values() for stack in alike]


def _common_folder(slices: Sequence[Slice]) -> Path:
    return Path(os.path.commonpath([image.path.parent for image in slices]))


def _stack_key(image: Slice) -> tuple:
    return image.modality, image.rows, image.columns, _is_localiser(image), image.is_colour


def _is_parallel(first: Slice, second: Slice) -> bool:
    """Whether two images have the same orientation but for rounding."""
    if first.orientation is None or second.orientation is None:
        return first.orientation is second.orientation
    return bool(np.allclose(first.orientation, second.orientation, rtol=0, atol=0.01))


def _is_localiser(image: Slice) -> bool:
    text = f"{' '.join(image.image_type)} {image.description}".lower()
    return any(word in text for word in ("localizer", "localiser", "scout", "topogram", "surview"))


def _split(slices: list[Slice]) -> list[tuple[tuple, list[Slice]]]:
    """The stacks in images of one series, each with what tells it apart; copies of the same image stay together."""
    by_position = group_by_position(slices)
    is_repeated = not all(map(are_copies, by_position.values()))
    is_whole = not is_repeated and _is_even_but_for_copies(slices)
    for is_stack in (is_even, has_no_position_twice) if is_repeated else (_is_even_but_for_copies,):
        for number, kind in enumerate(SPLITS):
            if is_whole and kind not in (ECHO, KERNEL):
                continue
            parts = defaultdict(list)
            for image in slices:
                parts[kind(image)].append(image)
            if 1 < len(parts) <= len(slices) / 2 and all(map(is_stack, parts.values())):
                # `key` and the folder tell the parts of the first four apart
                return [((value,) if number >= 4 else (), part) for value, part in parts.items()]
    return [((), slices)]


def _is_even_but_for_copies(slices: Sequence[Slice]) -> bool:
    return is_even([images[0] for images in group_by_position(slices).values()])


# Whether they are a volume


@dataclass(frozen=True)
class Stack:
    """A series that is a volume.

    slices: in their order. affine: voxel (column, row, slice) to mm in RAS; None where only conversion can tell (a
    mosaic).
    """

    label: str
    slices: tuple[Slice, ...]
    affine: np.ndarray | None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(columns, rows, slices); None of a mosaic."""
        return None if self.affine is None else (self.slices[0].columns, self.slices[0].rows, len(self.slices))

    @property
    def files(self) -> tuple[Path, ...]:
        """A file of several slices once."""
        return _files_of(self.slices)

    @property
    def _drift(self) -> float:
        """By how many voxels the last slice lies beside the first one's normal."""
        if self.affine is None:
            return inf
        in_plane, step = self.affine[:3, :2], self.affine[:3, 2]
        return float(np.abs(in_plane.T @ step / np.sum(in_plane**2, axis=0)).max()) * (len(self.slices) - 1)

    @property
    def is_plain(self) -> bool:
        """Whether any program reads its voxels, that they have one scale, and that their order can't be mistaken.

        dcm2niix takes frames in the file's order, wherever they lie, and turns tilted stacks around by their numbers.
        """
        scales = {(image.slope, image.intercept) for image in self.slices}
        return (
            self._drift < SMALL_DRIFT
            and len(scales) == 1
            and all(image.is_plain and image.frames == 1 for image in self.slices)
        )


def _files_of(slices: Iterable[Slice]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(image.path for image in slices))


def check_series(series: Series) -> Stack:
    """The slices of a series as an even stack.

    NotAVolume: localisers, colour images, maps of other units than HU among CT, fewer than five images. UserError: no
    position, orientation or pixel spacing, spacing of zero, several images of a position (a 4D series), slices that are
    missing, cut off or not evenly spaced.
    """
    first = series.slices[0]
    if _is_localiser(first):
        raise NotAVolume(f"{series.label}: a localiser")
    if first.is_colour:
        raise NotAVolume(f"{series.label}: colour images (a screenshot or report), not measured intensities")
    if first.modality == "CT":
        _require_hounsfield(series)
    damaged = [image for image in series.slices if image.fault]
    if damaged:
        raise UserError(
            f"{series.label}: {damaged[0].path.name} {damaged[0].fault}"
            + (f", as do {len(damaged) - 1} more" if len(damaged) > 1 else "")
            + ": export the series again"
        )
    if first.is_mosaic:
        return _check_mosaic(series)
    _require_geometry(series)
    slices, notes = _drop_copies(series)
    if len(slices) < MIN_SLICES:
        raise NotAVolume(f"{series.label}: {len(slices)} image(s): no volume")
    fault = unevenness(slices)
    if fault:
        raise UserError(f"{series.label}: {fault}")
    step = step_of(slices)
    row, column = directions_of(first)
    between_rows, between_columns = np.median([image.spacing for image in slices], axis=0)
    affine = np.eye(4)
    affine[:3, 0] = LPS_TO_RAS @ row * between_columns
    affine[:3, 1] = LPS_TO_RAS @ column * between_rows
    affine[:3, 2] = LPS_TO_RAS @ step
    affine[:3, 3] = LPS_TO_RAS @ np.array(slices[0].position)
    return Stack(series.label, tuple(slices), affine, (*series.notes, *notes, *_tilt_note(first, step)))


def _require_hounsfield(series: Series) -> None:
    units = {image.unit.strip().upper() for image in series.slices}
    if not units <= set(HOUNSFIELD):
        raise NotAVolume(f"{series.label}: CT in units of {'/'.join(sorted(units))} (RescaleType), not in HU")
    if any(image.intercept is None for image in series.slices):
        raise UserError(
            f"{series.label}: CT without RescaleIntercept: its voxels are not in Hounsfield units, export it again"
        )


def _check_mosaic(series: Series) -> Stack:
    if len(series.slices) > 1:
        raise UserError(
            f"{series.label}: a 4D series, {len(series.slices)} mosaics: export each time point as a series of its own"
        )
    return Stack(series.label, series.slices, None, (*series.notes, "a mosaic"))


def _require_geometry(series: Series) -> None:
    for tag, value in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient")):
        missing = [image.path.name for image in series.slices if getattr(image, tag) is None]
        if missing:
            raise UserError(f"{series.label}: no {tag} ({value}) in {len(missing)} image(s), e.g. {missing[0]}")
    spacings = {image.spacing for image in series.slices}
    if None in spacings or min(min(spacing) for spacing in spacings) <= 0:
        raise UserError(f"{series.label}: PixelSpacing is missing or zero: the size of a voxel is not known")
    if not np.allclose(list(spacings), next(iter(spacings)), rtol=SAME_PIXEL_SPACING, atol=0):
        raise UserError(f"{series.label}: images of different PixelSpacing, e.g. {sorted(spacings)[:2]}")
    directions = np.array(series.slices[0].orientation).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=UNIT_TOLERANCE):
        raise UserError(f"{series.label}: ImageOrientationPatient {series.slices[0].orientation} is no rotation")


def _drop_copies(series: Series) -> tuple[list[Slice], tuple[str, ...]]:
    """One slice for each position. Copies of an image go; different images of one position are a 4D series."""
    by_position = group_by_position(series.slices)
    for images in by_position.values():
        if not are_copies(images):
            raise UserError(
                f"{series.label}: a 4D series, {len(images)} different images of one position, {len(by_position)} "
                "positions: export each time point or contrast as a series of its own"
            )
    dropped = len(series.slices) - len(by_position)
    notes = (f"{dropped} duplicate slice(s) left out",) if dropped else ()
    return [images[0] for images in by_position.values()], notes


def _tilt_note(first: Slice, step: np.ndarray) -> tuple[str, ...]:
    cosine = np.clip(normal_of(first) @ step / np.linalg.norm(step), -1, 1)
    angle = float(np.degrees(np.arccos(cosine)))
    return (f"gantry tilt of {angle:.1f} degrees",) if angle > SHEAR_TOLERANCE_DEG else ()
