"""DICOM files as volumes: which files make up a series, whether its slices are a volume, and its voxels.

Headers are read by pydicom, voxels (with their slope and intercept, slice by slice) by SimpleITK. Patient coordinates
of DICOM are LPS in mm; affines here are RAS, as in NIfTI.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from common.errors import UserError

MIN_SLICES = 5  # fewer images are a localiser or a screenshot, not a volume
EVEN_TOLERANCE = 0.1  # share of the slice spacing by which a slice may lie beside its place in an even grid
SHEAR_TOLERANCE_DEG = 0.5  # a smaller angle between slice direction and slice normal is rounding
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
HEADER_TAGS = (
    "SOPClassUID SeriesInstanceUID SeriesNumber SeriesDescription Modality ImageType InstanceNumber EchoTime Rows "
    "Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation ImagePositionPatient ImageOrientationPatient "
    "PixelSpacing RescaleIntercept"
).split()
# What tells several images of one slice position apart that are volumes of their own: echoes, water and fat, and
# exports in which different people's series got the same identifier.
SPLITS = (
    lambda image: image.echo_time,
    lambda image: image.image_type,
    lambda image: (image.echo_time, image.image_type),
    lambda image: image.path.parent,
)


class NotAVolume(UserError):
    """Images that nobody takes for a training volume: localisers, screenshots. They are left out, not a fault."""


@dataclass(frozen=True, slots=True)  # there can be millions of them
class Slice:
    """What the header of one DICOM image says; None where it says nothing."""

    path: Path
    series_uid: str
    number: int
    description: str
    modality: str
    image_type: tuple[str, ...]
    echo_time: str
    rows: int
    columns: int
    frames: int
    is_colour: bool
    position: tuple[float, ...] | None  # of the first voxel's centre, LPS in mm
    orientation: tuple[float, ...] | None  # direction along a row, then along a column
    spacing: tuple[float, ...] | None  # between rows, then between columns, in mm
    has_intercept: bool  # RescaleIntercept: without it voxels of CT are not in HU


@dataclass(frozen=True)
class Series:
    """The images of one series that lie in one stack.

    folder: the one that holds all of them. slices: in the order of their position where it is known.
    label: folder and description, for messages and selection.
    """

    folder: Path
    slices: tuple[Slice, ...]

    @property
    def description(self) -> str:
        return self.slices[0].description

    @property
    def modality(self) -> str:
        return self.slices[0].modality

    @property
    def label(self) -> str:
        return f"{self.folder} [series {self.slices[0].number} {self.description}]".replace(" ]", "]")

    @property
    def key(self) -> str:
        """Eight characters that tell this stack from all others, whatever the names of its files."""
        first = self.slices[0]
        turned = None if first.orientation is None else [round(x, 1) + 0.0 for x in first.orientation]
        parts = (first.series_uid, *_stack_key(first), turned, first.echo_time, first.image_type)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


# Headers


def is_dicom(start: bytes) -> bool:
    """Whether a file with these first bytes (132 or more) is DICOM: with its preamble, or as older exports without."""
    return start[128:132] == b"DICM" or start[:4] in (b"\x08\x00\x05\x00", b"\x08\x00\x00\x00", b"\x08\x00\x08\x00")


def read_slice(path: Path) -> Slice | None:
    """The header of a DICOM image; None for DICOM objects without an image (reports, plans, directories).

    UserError: a damaged header.
    """
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=HEADER_TAGS, force=True)
        if "Rows" in header and "SeriesInstanceUID" in header:
            return _slice_of(path, header)
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    except (InvalidDicomError, OSError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{path}: a damaged DICOM header ({error}): export the file again") from error
    # An image whose header is cut off must not pass for an object without one: its slice would be missing unnoticed.
    if kind is None or "Image Storage" in pydicom.uid.UID(kind).name:
        raise UserError(f"{path}: a damaged DICOM header (cut off before the image): export the file again")
    return None


def _slice_of(path: Path, header: pydicom.FileDataset) -> Slice:
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    return Slice(
        path=path,
        series_uid=str(header.SeriesInstanceUID),
        number=int(header.get("SeriesNumber") or 0),
        description=str(header.get("SeriesDescription") or "").strip(),
        modality=str(header.get("Modality") or ""),
        image_type=tuple(map(str, header.get("ImageType") or ())),
        echo_time=str(header.get("EchoTime") or ""),
        rows=int(header.Rows),
        columns=int(header.Columns),
        frames=int(header.get("NumberOfFrames") or 1),
        is_colour=int(header.get("SamplesPerPixel") or 1) > 1 or not photometric.startswith("MONOCHROME"),
        position=_numbers(header.get("ImagePositionPatient"), 3),
        orientation=_numbers(header.get("ImageOrientationPatient"), 6),
        spacing=_numbers(header.get("PixelSpacing"), 2),
        has_intercept="RescaleIntercept" in header,
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.all(np.isfinite(numbers)) else None


# Series


def group_series(slices: Iterable[Slice]) -> list[Series]:
    """Sorts images into stacks: by series, and within one by size, orientation and purpose.

    A series that holds different images of each position (see SPLITS) gives a stack for each kind.
    """
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)
    for image in slices:
        alike = groups[image.series_uid, _stack_key(image)]
        stack = next((stack for stack in alike if _is_parallel(stack[0], image)), None)
        if stack is None:
            alike.append([image])
        else:
            stack.append(image)
    stacks = [stack for alike in groups.values() for members in alike for stack in _split(sorted(members, key=_place))]
    series = [Series(_common_folder(stack), tuple(stack)) for stack in stacks]
    return sorted(series, key=lambda one: (str(one.folder), one.slices[0].number, one.key))


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


def _place(image: Slice) -> tuple[float, str]:
    """Sorts along the slice normal."""
    if image.position is None or image.orientation is None:
        return 0.0, str(image.path)
    return float(np.dot(_normal(image), image.position)), str(image.path)


def _normal(image: Slice) -> np.ndarray:
    return np.cross(image.orientation[:3], image.orientation[3:])


def _split(slices: list[Slice]) -> list[list[Slice]]:
    """The stacks in images of one series; copies of the same image stay together."""
    repeated = [images for images in _by_position(slices).values() if len(images) > 1]
    if all(map(_are_copies, repeated)):
        return [slices]
    for kind in SPLITS:
        parts = defaultdict(list)
        for image in slices:
            parts[kind(image)].append(image)
        if len(parts) > 1 and all(len(_by_position(part)) == len(part) for part in parts.values()):
            return list(parts.values())
    return [slices]


def _by_position(slices: Sequence[Slice]) -> dict[tuple[float, ...], list[Slice]]:
    by_position = defaultdict(list)
    for image in slices:
        by_position[image.position].append(image)
    return by_position


def _are_copies(images: Sequence[Slice]) -> bool:
    """Whether the voxels of all these images are the same. Images without a position are not compared."""
    return images[0].position is None or len({_pixel_digest(image.path) for image in images}) == 1


# Volumes


@dataclass(frozen=True)
class Stack:
    """A series that is a volume. files: in slice order; affine: voxel (column, row, slice) to mm in RAS."""

    files: tuple[Path, ...]
    affine: np.ndarray
    notes: tuple[str, ...] = ()


def check_series(series: Series) -> Stack:
    """The slices of a series as an even stack.

    NotAVolume: localisers, colour images, fewer than five images. UserError: enhanced multi-frame files, no position,
    orientation or pixel spacing, spacing of zero, several images of a position (a 4D series), slices that are missing
    or not evenly spaced.
    """
    first = series.slices[0]
    if _is_localiser(first):
        raise NotAVolume(f"{series.label}: a localiser")
    if first.is_colour:
        raise NotAVolume(f"{series.label}: colour images (a screenshot or report), not measured intensities")
    if first.frames > 1:
        raise UserError(
            f"{series.label}: an enhanced multi-frame file of {first.frames} frames: convert it to NIfTI first, "
            "e.g. with dcm2niix"
        )
    if first.modality == "CT" and not all(image.has_intercept for image in series.slices):
        raise UserError(
            f"{series.label}: CT without RescaleIntercept: its voxels are not in Hounsfield units, export it again"
        )
    _require_geometry(series)
    slices, notes = _drop_copies(series)
    if len(slices) < MIN_SLICES:
        raise NotAVolume(f"{series.label}: {len(slices)} image(s): no volume")
    step = _even_step(series, slices)
    notes += _tilt_note(first, step)
    row, column = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    affine = np.eye(4)
    affine[:3, 0] = LPS_TO_RAS @ row * first.spacing[1]
    affine[:3, 1] = LPS_TO_RAS @ column * first.spacing[0]
    affine[:3, 2] = LPS_TO_RAS @ step
    affine[:3, 3] = LPS_TO_RAS @ np.array(slices[0].position)
    return Stack(tuple(image.path for image in slices), affine, notes)


def read_stack(stack: Stack) -> np.ndarray:
    """The voxels (columns, rows, slices) as float32 in real units: stored values times slope plus intercept.

    UserError: files whose pixel data are damaged or of an unknown compression.
    """
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in stack.files])
    reader.SetOutputPixelType(sitk.sitkFloat32)  # slices may have different slopes, the first one must not decide
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # about uneven spacing, which is checked here more exactly
    try:
        array = sitk.GetArrayFromImage(reader.Execute())  # (slices, rows, columns)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"{stack.files[0].parent}: the images cannot be read ({reason}): truncated or of an unknown compression, "
            "export the series again, uncompressed"
        ) from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
    return np.ascontiguousarray(array.transpose(2, 1, 0))  # (columns, rows, slices)


def _require_geometry(series: Series) -> None:
    for tag, value in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient")):
        missing = [image.path.name for image in series.slices if getattr(image, tag) is None]
        if missing:
            raise UserError(f"{series.label}: no {tag} ({value}) in {len(missing)} image(s), e.g. {missing[0]}")
    spacings = {image.spacing for image in series.slices}
    if None in spacings or min(min(spacing) for spacing in spacings) <= 0:
        raise UserError(f"{series.label}: PixelSpacing is missing or zero: the size of a voxel is not known")
    if len(spacings) > 1:
        raise UserError(f"{series.label}: images of different PixelSpacing, e.g. {sorted(spacings)[:2]}")
    row, column = np.array(series.slices[0].orientation[:3]), np.array(series.slices[0].orientation[3:])
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2):
        raise UserError(f"{series.label}: ImageOrientationPatient {series.slices[0].orientation} is no rotation")


def _drop_copies(series: Series) -> tuple[list[Slice], tuple[str, ...]]:
    """One slice for each position. Copies of an image go; different images of one position are a 4D series."""
    by_position = _by_position(series.slices)
    for images in by_position.values():
        if len(images) > 1 and not _are_copies(images):
            raise UserError(
                f"{series.label}: a 4D series, {len(images)} different images of one position, {len(by_position)} "
                "positions: export each time point or contrast as a series of its own"
            )
    dropped = len(series.slices) - len(by_position)
    notes = (f"{dropped} duplicate slice(s) left out",) if dropped else ()
    return [images[0] for images in by_position.values()], notes


def _pixel_digest(path: Path) -> bytes:
    return hashlib.sha256(pydicom.dcmread(path, force=True).get("PixelData") or b"").digest()


def _even_step(series: Series, slices: Sequence[Slice]) -> np.ndarray:
    """The step from slice to slice in mm, LPS."""
    positions = np.array([image.position for image in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    gaps = np.diff(positions @ _normal(slices[0]))
    usual = float(np.median(gaps))
    off = np.abs(positions - (positions[0] + np.arange(len(slices))[:, None] * step)).max()
    if usual <= 0:
        raise UserError(f"{series.label}: the slices do not follow each other (slice spacing of zero)")
    if max(np.abs(gaps - usual).max(), off) > EVEN_TOLERANCE * usual:
        worst = int(np.abs(gaps - usual).argmax())
        raise UserError(
            f"{series.label}: slices are not evenly spaced: mostly {usual:g} mm, but {gaps[worst]:g} mm between "
            f"{slices[worst].path.name} and {slices[worst + 1].path.name}: slices are missing, or two stacks are mixed"
        )
    return step


def _tilt_note(first: Slice, step: np.ndarray) -> tuple[str, ...]:
    cosine = np.clip(_normal(first) @ step / np.linalg.norm(step), -1, 1)
    angle = float(np.degrees(np.arccos(cosine)))
    return (f"gantry tilt of {angle:.1f} degrees",) if angle > SHEAR_TOLERANCE_DEG else ()
