"""What the headers of DICOM files say, one entry for each slice; by pydicom, without the voxels.

Patient coordinates of DICOM are LPS in mm.
"""

import gzip
import io
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian

from common.errors import UserError
from dataset.volumes.gzip_files import GZIP_MAGIC

DAMAGED_HEADER = (
    InvalidDicomError, BytesLengthException, OSError, EOFError, zlib.error, ValueError, TypeError, AttributeError,
    KeyError, IndexError, NotImplementedError,
)  # fmt: skip
PREAMBLE = 128
MOST_INFLATED = 2**30  # bytes of a gzipped file; it could hold a thousand times its own size
NIFTI_MAGIC = (b"n+1\0", b"ni1\0")  # from byte 344; the preamble of a DICOM file may begin with anything
PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)  # float, double and whole numbers
UNKNOWN_LENGTH = 0xFFFFFFFF  # of compressed voxels
HEADER_TAGS = (
    "SOPClassUID PatientID PatientName StudyInstanceUID SeriesInstanceUID SeriesNumber SeriesDescription Modality "
    "ImageType AcquisitionNumber EchoTime ConvolutionKernel Rows Columns NumberOfFrames BitsAllocated "
    "PixelRepresentation SamplesPerPixel PhotometricInterpretation ImagePositionPatient ImageOrientationPatient "
    "PixelSpacing RescaleIntercept RescaleSlope RescaleType SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence"
).split()


@dataclass(frozen=True, slots=True)  # there can be millions of them
class Slice:
    """What the header of one DICOM image, or of one frame of several, says; None where it says nothing.

    fault: what is wrong with its voxels, as far as the header and the length of the file tell.
    """

    path: Path
    frame: int
    patient: str
    study: str
    series_uid: str
    number: int
    description: str
    modality: str
    image_type: tuple[str, ...]
    acquisition: str
    echo_time: str
    kernel: str
    rows: int
    columns: int
    frames: int
    is_colour: bool
    is_plain: bool  # any program reads its voxels and their scale rightly
    position: tuple[float, ...] | None  # of the first voxel's centre, LPS in mm
    orientation: tuple[float, ...] | None  # direction along a row, then along a column
    spacing: tuple[float, ...] | None  # between rows, then between columns, in mm
    slope: float  # 1 where it is missing, empty or 0
    intercept: float | None  # without it voxels of CT are not in HU
    unit: str  # RescaleType
    fault: str = ""

    @property
    def is_mosaic(self) -> bool:
        """Whether it holds all slices of a volume side by side."""
        return "MOSAIC" in self.image_type


def is_dicom(start: bytes) -> bool:
    """Whether a file with these first bytes (348 or more, if it has them) is DICOM: by its preamble, or without one,
    as older exports are, by its first element, of group 2 or 8 in either byte order."""
    if start[PREAMBLE : PREAMBLE + 4] == b"DICM":
        return start[344:348] not in NIFTI_MAGIC
    little, big = start[:2] in (b"\x02\0", b"\x08\0"), start[:2] in (b"\0\x02", b"\0\x08")
    if len(start) < 8 or not (little or big):
        return False
    if re.fullmatch(rb"[A-Z]{2}", start[4:6]):
        return start[4:6].decode() in pydicom.valuerep.VR.__members__
    length = int.from_bytes(start[4:8], "little" if little else "big")
    return length % 2 == 0 and length <= 1024  # without names of types; the first elements are short


def open_dicom(path: Path) -> IO[bytes]:
    """The file, or its content where it is gzipped."""
    file = path.open("rb")
    start = file.read(len(GZIP_MAGIC))
    file.seek(0)
    if start != GZIP_MAGIC:
        return file
    with file:
        content = gzip.GzipFile(fileobj=file).read(MOST_INFLATED + 1)
    if len(content) > MOST_INFLATED:
        raise UserError(f"{path}: the gzip file holds more than {MOST_INFLATED >> 30} GiB: unpack it if that is right")
    return io.BytesIO(content)


def read_slices(path: Path) -> list[Slice]:
    """The images in a DICOM file; none in objects without an image (reports, plans, directories).

    UserError: a damaged header.
    """
    lengths: list[int] = []

    def at_voxels(tag: int, _vr: str | None, length: int) -> bool:
        if tag in PIXEL_TAGS:
            lengths.append(length)
        return tag in PIXEL_TAGS

    try:
        with open_dicom(path) as file, warnings.catch_warnings(action="ignore"):  # odd values are judged here
            header = read_partial(file, at_voxels, force=True, specific_tags=list(map(Tag, HEADER_TAGS)))
            voxels_at = file.tell() + (8 if header.original_encoding[0] else 12)  # after tag, type and length
            num_bytes = file.seek(0, io.SEEK_END) - voxels_at
        if "Rows" in header and "Columns" in header:
            fault = _fault_of_voxels(header, lengths, num_bytes)
            return list(_slices_of(path, header, fault))
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    except UserError:
        raise
    except DAMAGED_HEADER as error:
        raise UserError(f"{path}: a damaged DICOM header ({error}): export the file again") from error
    # An image whose header is cut off must not pass for an object without one: its slice would be missing unnoticed.
    if kind is None or "Image Storage" in UID(kind).name:
        raise UserError(f"{path}: a damaged DICOM header (cut off before the image): export the file again")
    return []


def is_compressed(header: pydicom.FileDataset) -> bool:
    """Whether the voxels need a decoder."""
    syntax = UID(header.file_meta.get("TransferSyntaxUID") or ImplicitVRLittleEndian)
    return syntax.is_transfer_syntax and not syntax.is_private and syntax.is_encapsulated


def has_signed_bytes(header: pydicom.Dataset) -> bool:
    """Whether voxels are bytes from -128 to 127, which dcm2niix takes for 0 to 255."""
    return header.get("BitsAllocated") == 8 and header.get("PixelRepresentation") == 1


def _fault_of_voxels(header: pydicom.FileDataset, lengths: Sequence[int], num_bytes: int) -> str:
    """What is wrong with the voxels, "" if nothing. num_bytes: what the file has of them and of what follows."""
    if not lengths:
        return "has no voxels: the file is cut off, or was exported without them"
    if lengths[0] == UNKNOWN_LENGTH:
        return ""
    needed = voxel_bytes(header)
    if lengths[0] < needed:
        return f"has {lengths[0]} bytes of voxels where its size needs {needed}"
    is_deflated = header.file_meta.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian  # unpacked on reading
    if num_bytes < needed and not is_deflated:
        return f"is cut off: {max(num_bytes, 0)} of {needed} bytes of voxels are left"
    return ""


def voxel_bytes(header: pydicom.Dataset) -> int:
    """Bytes of uncompressed voxels that the header announces."""
    bits = int(header.get("BitsAllocated") or 8) * _whole(header.get("SamplesPerPixel"), 1)
    return (int(header.Rows) * int(header.Columns) * _whole(header.get("NumberOfFrames"), 1) * bits + 7) // 8


def _slices_of(path: Path, header: pydicom.FileDataset, fault: str) -> Iterator[Slice]:
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    frames = _whole(header.get("NumberOfFrames"), 1)
    groups = header.get("PerFrameFunctionalGroupsSequence") or [None]
    common = {
        "path": path,
        "patient": f"{header.get('PatientID') or ''} {header.get('PatientName') or ''}".strip(),
        "study": str(header.get("StudyInstanceUID") or ""),
        "series_uid": str(header.get("SeriesInstanceUID") or ""),
        "number": _whole(header.get("SeriesNumber"), 0),
        "description": str(header.get("SeriesDescription") or "").strip(),
        "modality": str(header.get("Modality") or ""),
        "image_type": tuple(map(str, header.get("ImageType") or ())),
        "acquisition": str(header.get("AcquisitionNumber") or ""),
        "echo_time": str(header.get("EchoTime") or ""),
        "kernel": str(header.get("ConvolutionKernel") or ""),
        "rows": int(header.Rows),
        "columns": int(header.Columns),
        "frames": frames,
        "is_colour": int(header.get("SamplesPerPixel") or 1) > 1 or not photometric.startswith("MONOCHROME"),
        "fault": fault,
    }
    if len(groups) != frames:
        common["fault"] = fault or f"holds {frames} frames and doesn't say where each one lies"
        groups = [None]
    for frame, own in enumerate(groups):
        find = partial(_find, header, own)
        slope = find("PixelValueTransformationSequence", "RescaleSlope", 1)
        (factor,) = _numbers([slope], 1) or [0.0]
        yield Slice(
            frame=frame,
            position=_numbers(find("PlanePositionSequence", "ImagePositionPatient"), 3),
            orientation=_numbers(find("PlaneOrientationSequence", "ImageOrientationPatient"), 6),
            spacing=_numbers(find("PixelMeasuresSequence", "PixelSpacing"), 2),
            slope=factor or 1.0,
            intercept=(_numbers([find("PixelValueTransformationSequence", "RescaleIntercept")], 1) or [None])[0],
            is_plain=factor != 0 and not is_compressed(header) and not has_signed_bytes(header),
            unit=str(find("PixelValueTransformationSequence", "RescaleType") or ""),
            **common,
        )


def _find(header: pydicom.Dataset, frame: pydicom.Dataset | None, group: str, name: str, missing: Any = None) -> Any:
    """A value of one frame: its own, that of all frames, or that of the image; `missing` where it isn't there."""
    shared = header.get("SharedFunctionalGroupsSequence")
    for place in (frame, shared[0] if shared else None):
        items = place.get(group) if place is not None else None
        if items and name in items[0]:
            return items[0][name].value
    return header.get(name, missing)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.all(np.isfinite(numbers)) else None


def _whole(value: Any, otherwise: int) -> int:
    try:
        return int(value or otherwise)
    except (TypeError, ValueError, OverflowError):
        return otherwise
