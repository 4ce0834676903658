"""Small DICOM series for tests, written with pydicom as scanners write them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
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
