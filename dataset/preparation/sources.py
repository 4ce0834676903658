"""The volumes in a folder tree of a hospital's files: NIfTI files and DICOM series, found by their content."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import file_sha256
from common.parallel import map_in_processes
from common.places import exists, is_file, is_folder
from dataset.preparation.dicom_conversion import convert
from dataset.preparation.dicom_header import Slice, is_dicom, read_slices
from dataset.preparation.dicom_series import Series, check_series, group_series
from dataset.volumes.geometry import PLAUSIBLE_SPACING, affine_of_orientation, is_plausible_spacing, mm_text, spacing_of
from dataset.volumes.gzip_files import GZIP_MAGIC
from dataset.volumes.index import OTHER_IMAGE_SUFFIXES, VOLUME_SUFFIX, walk_files
from dataset.volumes.nifti_header import HEADER_BYTES, NIFTI_STARTS
from dataset.volumes.volume_io import NIFTI_SUFFIXES, Header, read_header, read_nifti

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True)
class Source:
    """One volume before preprocessing: a NIfTI file, or a DICOM series.

    name: its path below the input folder, without suffix; of a series the folder and its number and key.
    files: what it consists of. series: None for NIfTI.
    """

    name: str
    files: tuple[Path, ...]
    series: Series | None = None

    @property
    def title(self) -> str:
        """What `select` is searched in: the path below the input folder, and of a series its folder and description."""
        return f"{Path(self.name).parent} {self.series.description}" if self.series else self.name

    @property
    def label(self) -> str:
        """For messages: where the source lies."""
        return self.series.label if self.series else str(self.files[0])


@dataclass(frozen=True)
class Scan:
    """A volume as it was measured.

    data: (X, Y, Z) float32, axes as stored; affine: voxels to mm in RAS, (4, 4); notes: what was handled on reading.
    """

    data: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


@dataclass
class Found:
    """What a folder tree holds.

    failed: (file, reason) of damaged files and of images that aren't read; archives: files that may hold images;
    num_other: files of other kinds.
    """

    sources: list[Source] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    archives: list[Path] = field(default_factory=list)
    num_other: int = 0


# Finding


def find_sources(folder: str | Path, num_workers: int = 0) -> Found:
    """All NIfTI files and DICOM series below a folder, by their content, whatever their names; sorted by name.

    A file that is named as an image counts as one, so that a damaged one, or one of a format that isn't read, is not
    passed over. Hidden files and folders are left out.
    UserError: no such folder, or nothing of either kind in it.
    """
    folder = Path(folder)
    if is_file(folder):
        raise UserError(f"input: {folder} is a file: give the folder that it lies in, {folder.parent}")
    if not is_folder(folder):
        raise UserError(f"input: {folder}: no such folder")
    found, closed = Found(), []
    files = [path for path in walk_files(folder, closed.append) if path.name != "DICOMDIR"]
    for error in closed:
        found.failed.append((str(error.filename), f"cannot be listed or entered ({error.strerror}): what is in it?"))
    slices = _sort_files(found, folder, files, num_workers)
    damaged = [Path(path) for path, _ in found.failed if not path.lower().endswith(OTHER_IMAGE_SUFFIXES)]
    for series in group_series(slices):
        place = series.folder.relative_to(folder) / f"series{series.slices[0].number:03d}_{series.key}"
        found.sources.append(Source(place.as_posix(), series.files, _with_note_of(damaged, series)))
    if not found.sources and not found.failed:
        archives = f"{len(found.archives)} archives, unpack them, and " if found.archives else ""
        raise UserError(
            f"input: {folder}: no NIfTI file and no DICOM image below it ({archives}{found.num_other} other files)"
        )
    found.sources.sort(key=lambda source: source.name)
    return found


def _sort_files(found: Found, folder: Path, files: Sequence[Path], num_workers: int) -> list[Slice]:
    """Adds to `found` all but the images of DICOM, which are returned."""
    slices, others = [], []
    looks = dict(map_in_processes(_look, files, num_workers, "looking at files", unit="file"))
    for index, path in enumerate(files):
        look = looks[index]
        if isinstance(look, list):
            slices += look
        elif look == "nifti":
            name = re.sub(r"\.nii(\.gz)?$", "", path.relative_to(folder).as_posix())
            found.sources.append(Source(name, (path,)))
        elif look is not None:
            found.failed.append((str(path), look.removeprefix(f"{path}: ")))
        elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
            found.archives.append(path)
        else:
            others.append(path)
    dicom = {(image.path.parent, image.path.suffix) for image in slices}
    empty = [path for path in others if (path.parent, path.suffix) in dicom and path.stat().st_size == 0]
    found.failed += [(str(path), "an empty file among DICOM images") for path in empty]
    found.num_other = len(others) - len(empty)
    return slices


def _with_note_of(damaged: Sequence[Path], series: Series) -> Series:
    """Which series a file without header belongs to is not known; the slices of one may be fewer than they were."""
    folders = {path.parent for path in series.files}
    beside = [path.name for path in damaged if path.parent in folders]
    if not beside:
        return series
    note = f"{len(beside)} damaged file(s) beside it, e.g. {beside[0]}: slices may be missing"
    return replace(series, notes=(*series.notes, note))


def _look(path: Path) -> list[Slice] | str | None:
    """The headers of a DICOM file's images, "nifti", None for anything else, or what is wrong with the file."""
    try:
        start = _first_bytes(path)
        is_empty = path.stat().st_size == 0
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    try:
        if is_dicom(start):
            return read_slices(path) or None
        if path.suffix.lower() == ".hdr" and exists(path.with_suffix(".img")):
            return None  # the volume is named by its voxels
        if start[:4] in NIFTI_STARTS or path.name.lower().endswith(NIFTI_SUFFIXES):
            return "nifti"
    except UserError as error:
        return str(error)
    name = path.name.lower()
    if name.removesuffix(".gz").endswith(DICOM_SUFFIXES):
        return "an empty file" if is_empty else "named as DICOM, but its content is not: truncated or damaged?"
    if name.endswith(OTHER_IMAGE_SUFFIXES):
        return f"volumes of this format are not read: convert it to {VOLUME_SUFFIX}, or move it away"
    return None


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
        if start[:2] != GZIP_MAGIC:
            return start
        file.seek(0)
        try:
            return gzip.GzipFile(fileobj=file).read(HEADER_BYTES)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return start


# Reading


def read_source(source: Source, orientation: str | None = None) -> Scan:
    """The voxels of a source, after the check that it is a volume whose geometry is known.

    orientation: axes of NIfTI files that don't say theirs, e.g. "LPS" (towards which x, y and z rise); None refuses
        such files.
    NotAVolume, UserError: as `dicom_series.check_series`, `dicom_conversion.convert` and `volume_io.read_nifti`; NIfTI
    files without orientation, with a spacing that is zero or no plausible size in mm.
    """
    if source.series is None:
        data, header = read_nifti(source.files[0])
        return Scan(data, *_nifti_affine(header, orientation))
    stack = check_series(source.series)
    data, affine = convert(stack)
    if not np.isfinite(data).all():
        raise UserError(f"{source.label}: NaN or infinite voxels")
    return Scan(data, _plausible(affine, source.label), stack.notes)


def check_source(source: Source, orientation: str | None = None) -> None:
    """What can be said of a source by its headers alone. NotAVolume, UserError: as `read_source`."""
    if source.series is None:
        _nifti_affine(read_header(source.files[0]), orientation)
    else:
        affine = check_series(source.series).affine
        if affine is not None:
            _plausible(affine, source.label)


def _nifti_affine(header: Header, orientation: str | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine in mm, and what was handled to get it."""
    path, notes, affine = header.path, list(header.notes), header.affine
    for length in header.spacing_mm:
        if not 0 < length < np.inf:
            raise UserError(f"{path}: a spacing of {length:g} in the header ({mm_text(header.spacing_mm)}): correct it")
    if header.is_oriented and header.geometry_fault:
        raise UserError(
            f"{path}: two geometries in the header that disagree, {header.geometry_fault}: which one is right is not "
            "known; remove the wrong one (set its code to 0), or make the file again from its source"
        )
    if not header.is_oriented:
        if orientation is None:
            raise UserError(
                f"{path}: no orientation ({header.geometry_fault}): which side is left is not known; if you know, "
                "give assume_orientation, e.g. --assume-orientation LPS"
            )
        affine = affine_of_orientation(orientation, header.spacing_mm)
        notes.append(f"orientation assumed to be {orientation}")
    if header.unit not in ("mm", "unknown"):
        affine = np.diag([*[MM_PER_UNIT[header.unit]] * 3, 1.0]) @ affine
        notes.append(f"header in {header.unit}, converted to mm")
    return _plausible(affine, str(path)), tuple(notes)


def _plausible(affine: np.ndarray, label: str) -> np.ndarray:
    spacing = spacing_of(affine)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UserError(f"{label}: spacing {mm_text(spacing)}: a voxel without extent, the header is damaged")
    if not is_plausible_spacing(spacing):
        raise UserError(
            f"{label}: spacing {mm_text(spacing)} is not that of a scan ({PLAUSIBLE_SPACING}): wrong units in "
            "the header, correct it there"
        )
    return affine


# Identity


def fingerprint(source: Source) -> dict[str, int]:
    """What tells cheaply that a source is unchanged: number of files, bytes, time of the newest change."""
    stats = [path.stat() for path in source.files]
    return {
        "num_files": len(stats),
        "bytes": sum(stat.st_size for stat in stats),
        "mtime_ns": max(stat.st_mtime_ns for stat in stats),
    }


def source_sha256(source: Source) -> str:
    """SHA-256 of a file's content; of several files that of their hashes, sorted, so that names don't matter."""
    digests = [file_sha256(path) for path in source.files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()
