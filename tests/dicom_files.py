"""Small DICOM series for tests, written with pydicom as scanners write them."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    generate_uid,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
FRAME_GROUPS = {
    "PlanePositionSequence": ["ImagePositionPatient"],
    "PlaneOrientationSequence": ["ImageOrientationPatient"],
    "PixelMeasuresSequence": ["PixelSpacing", "SliceThickness"],
    "PixelValueTransformationSequence": ["RescaleIntercept", "RescaleSlope", "RescaleType"],
}
RAMP = np.array([6.0, 4.0, 3.0])  # HU per mm of patient coordinates (LPS)
STORAGE = {"CT": CTImageStorage, "MR": MRImageStorage}


def write_series(
    folder: Path,
    volume: np.ndarray,
    *,
    modality: str = "CT",
    spacing_mm: Sequence[float] = (1.0, 1.0, 1.0),
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
    orientation: Sequence[float] = AXIAL,
    step_mm: Sequence[float] | None = None,
    slope: float = 1.0,
    intercept: float = -1024.0,
    dtype: type = np.uint16,
    description: str = "axial",
    number: int = 1,
    prefix: str = "im",
    positions_mm: Sequence[Sequence[float]] | None = None,
    uid: str | None = None,
    tags: dict[str, Any] | None = None,
    each: Sequence[dict[str, Any]] | None = None,
) -> list[Path]:
    """Writes one file per slice, in shuffled file order, and returns them in slice order.

    volume: (rows, columns, slices) in real units (HU for CT); stored values are (volume - intercept) / slope.
    spacing_mm: between columns, rows, slices. step_mm: from slice to slice in patient coordinates (LPS); None is along
    the slices' normal. positions_mm: of every slice, in place of origin and step.
    tags: overwrite those of every file; a value of None removes the tag. each: the same for every slice of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    step = np.cross(row, column) * spacing_mm[2] if step_mm is None else np.array(step_mm)
    names = np.random.default_rng(0).permutation(volume.shape[2])
    paths = []
    for k in range(volume.shape[2]):
        position = np.array(origin_mm) + k * step if positions_mm is None else np.array(positions_mm[k])
        path = folder / f"{prefix}{names[k]:04d}"
        stored = np.round((volume[:, :, k] - intercept) / slope)
        header = _header(modality, stored.astype(dtype), k, uid)
        header.SeriesDescription, header.SeriesNumber = description, number
        header.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
        header.ImageOrientationPatient = list(orientation)
        header.ImagePositionPatient = [round(float(x), 6) for x in position]
        if modality == "CT":
            header.RescaleSlope, header.RescaleIntercept, header.RescaleType = slope, intercept, "HU"
        for name, value in {**(tags or {}), **(each[k] if each else {})}.items():
            if value is None:
                delattr(header, name)
            else:
                setattr(header, name, value)
        header.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _header(modality: str, stored: np.ndarray, k: int, uid: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = STORAGE[modality]
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID, header.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    header.SeriesInstanceUID, header.StudyInstanceUID = uid, generate_uid()
    header.PatientName, header.PatientID = "Test^Person", "T1"
    header.Modality, header.InstanceNumber = modality, k + 1
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.SliceThickness = 1
    header.Rows, header.Columns = stored.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    bits = stored.dtype.itemsize * 8
    header.BitsAllocated, header.BitsStored, header.HighBit = bits, bits, bits - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.PixelData = stored.tobytes()
    return header


def ramp(places_mm: np.ndarray) -> np.ndarray:
    """Values that are linear over the patient, so that whatever comes out is checked where it lies: (..., 3) LPS."""
    return places_mm @ RAMP + 20


def ramp_volume(
    shape: Sequence[int] = (7, 6, 8),
    spacing_mm: Sequence[float] = (1.5, 1.25, 2.5),
    origin_mm: Sequence[float] = (-4.0, -5.0, -9.0),
    step_mm: Sequence[float] = (0.0, 0.0, 2.5),
) -> tuple[np.ndarray, dict[str, Any]]:
    """An axial volume (rows, columns, slices) of the ramp, and the geometry that `write_series` needs for it."""
    r, c, k = np.meshgrid(*map(np.arange, shape), indexing="ij")
    in_plane = np.stack([c * spacing_mm[0], r * spacing_mm[1], np.zeros(shape)], axis=-1)
    volume = ramp(np.array(origin_mm) + in_plane + k[..., None] * np.array(step_mm))
    return volume, {"spacing_mm": spacing_mm, "origin_mm": origin_mm, "step_mm": step_mm}


def ramp_error(data: np.ndarray, affine: np.ndarray) -> float:
    """How far voxels (any axes; affine to RAS mm) are from the ramp's values at their places."""
    grid = np.stack(np.meshgrid(*map(np.arange, data.shape), indexing="ij"), axis=-1)
    places = (grid @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    return float(np.abs(data - ramp(places)).max())


def write_enhanced(paths: Sequence[Path], file: Path, frames_per_file: int | None = None) -> list[Path]:
    """Slices as enhanced multi-frame files, which say in groups where each frame lies; the slices are removed."""
    count = frames_per_file or len(paths)
    made = []
    for start in range(0, len(paths), count):
        slices = [dcmread(path) for path in paths[start : start + count]]
        header = deepcopy(slices[0])
        sop = EnhancedCTImageStorage if header.Modality == "CT" else EnhancedMRImageStorage
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = sop
        header.NumberOfFrames = len(slices)
        groups = []
        for image in slices:
            group = Dataset()
            for name, tags in FRAME_GROUPS.items():
                item = Dataset()
                for tag in tags:
                    if tag in image:
                        item[tag] = image[tag]
                if item:
                    setattr(group, name, Items([item]))
            groups.append(group)
        for tag in [tag for tags in FRAME_GROUPS.values() for tag in tags if tag in header]:
            delattr(header, tag)
        header.PerFrameFunctionalGroupsSequence = Items(groups)
        header.PixelData = b"".join(image.PixelData for image in slices)
        made.append(file.with_name(f"{file.name}{start:03d}"))
        header.save_as(made[-1], enforce_file_format=True)
    for path in paths:
        path.unlink()
    return made
