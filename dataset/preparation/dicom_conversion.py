"""The voxels of a DICOM series, converted by dcm2niix (Li et al., J. Neurosci. Methods 2016).

dcm2niix takes files as they are where it can. What it can't read (no preamble, deflated), would sort into several
volumes (by series number or time of the study, say) or would scale by one slope where each slice has its own is written
again, a file a slice, with what the volume needs alone. So are files of several frames, which it takes in the file's
order wherever they lie, and tilted stacks, which it turns around where they are numbered against their normal. Signed
bytes, which it takes for unsigned ones, are written as 16 bits. What is compressed is unpacked by SimpleITK before:
dcm2niix doesn't extend the sign of JPEG 2000 and JPEG-LS voxels of fewer bits than are stored (a CT's mean became 4438
in place of -658) and refuses JPEG of 12 bits. Where slices lie is what their headers say: dcm2niix's affine of a tilted
stack is without the tilt (29 HU off in a ramp of 4 HU/mm).
"""

import io
import math
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import dcm2niix
import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)
from pydicom.valuerep import DSfloat

from common.errors import UserError
from dataset.preparation.dicom_header import (
    DAMAGED_HEADER,
    Slice,
    has_signed_bytes,
    is_compressed,
    open_dicom,
    voxel_bytes,
)
from dataset.preparation.dicom_places import MIN_SLICES
from dataset.preparation.dicom_series import Stack
from dataset.preparation.measured import NotAVolume
from dataset.volumes.geometry import size_text, spacing_of

# No defaults of the user's, one volume if headers allow it, nothing cropped, turned or left out, values as stored.
OPTIONS = "-g i -m y -x i -i n -l o -z n -b n -d 1 -w 1 -f volume".split()
NOISE = ("dcm2niiX version", "Patient Position", "determine manufacturer", "Conversion required", "Found ")
PIXEL_TAGS = "SamplesPerPixel Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation".split()
TIMEOUT_S = 1800
COPIES = 3  # of a volume that may lie on the disk at once: written again, twice converted
NEAR = 0.5  # voxels between where dcm2niix and the headers see the first one


def convert(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """The voxels (columns, rows, slices) as float32 in real units, stored values times slope plus intercept, and the
    affine, voxels to mm in RAS.

    UserError: voxels that are damaged or of an unknown compression, a volume that isn't the one that the headers
    describe. NotAVolume: a mosaic of few slices.
    """
    with tempfile.TemporaryDirectory(prefix="dicom_") as place:
        num_bytes = max(sum(path.stat().st_size for path in stack.files), 4 * math.prod(stack.shape or (0,)))
        needed, free = COPIES * num_bytes, shutil.disk_usage(place).free
        if free < needed:
            raise UserError(f"{place}: {free:,} bytes are free, {needed:,} are needed to convert: set TMPDIR to a disk")
        found: tuple[np.ndarray, np.ndarray] | str = ""
        if stack.affine is None or stack.is_plain:
            files = _link_files(stack, Path(place, "files"))
            # Without "-p n" a scanner's private scale would be used in place of the standard's.
            found = _run(stack, files, "-p", "n")
        if isinstance(found, str) and stack.affine is not None:
            found = _run(stack, _write_files(stack, Path(place, "written")))
    if isinstance(found, str):
        raise UserError(f"{stack.label}: dcm2niix makes no volume of it ({found}): export the series again")
    data, affine = found
    if stack.affine is not None:
        return _in_order_of_headers(stack, data, affine), stack.affine
    if data.shape[2] < MIN_SLICES:
        raise NotAVolume(f"{stack.label}: a mosaic of {data.shape[2]} image(s): no volume")
    return data, affine


def _run(stack: Stack, files: Path, *options: str) -> tuple[np.ndarray, np.ndarray] | str:
    """The one volume of the size that headers describe, and its affine; else why there is none."""
    out = files.with_name(f"{files.name}_converted")
    out.mkdir()
    command = [dcm2niix.bin, *OPTIONS, *options, "-o", str(out), str(files)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no end after {TIMEOUT_S} s"
    except OSError as error:
        raise UserError(
            f"{dcm2niix.bin}: cannot be run ({error.strerror}): pip install --force-reinstall dcm2niix"
        ) from error
    words = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    images = [nib.load(path) for path in sorted(out.glob("*.nii"))]
    shapes = [image.shape for image in images]
    if shapes == [stack.shape] or (stack.shape is None and len(shapes) == 1 and len(shapes[0]) == 3):
        return np.asarray(images[0].dataobj, dtype=np.float32), images[0].affine
    if shapes:
        wanted = "one" if stack.shape is None else size_text(stack.shape)
        return f"{', '.join(map(size_text, shapes))} in place of {wanted}"
    said = [line.replace(f"{files}/", "") for line in words if line and not any(noise in line for noise in NOISE)]
    return "; ".join(said[:3]) or f"exit status {done.returncode}"


def _link_files(stack: Stack, folder: Path) -> Path:
    """A folder with the files as they are, under names that any program takes; gzipped ones unpacked."""
    folder.mkdir()
    for number, path in enumerate(stack.files):
        with open_dicom(path) as file:
            if isinstance(file, io.BytesIO):
                (folder / _name(number)).write_bytes(file.getbuffer())
            else:
                (folder / _name(number)).symlink_to(path.absolute())
    return folder


def _name(number: int) -> str:
    return f"{number:06d}.dcm"


# Writing files again


def _write_files(stack: Stack, folder: Path) -> Path:
    """A folder with the same slices in their order, uncompressed, one a file, with what a volume needs alone.

    UserError: voxels that are incomplete or of an unknown compression.
    """
    folder.mkdir()
    uid, image, voxels = generate_uid(), None, b""
    for number, one in enumerate(stack.slices):
        try:
            with warnings.catch_warnings(action="ignore"):  # odd values that a volume doesn't need
                if image is None or image.filename != one.path:
                    image = _read_uncompressed(one.path, folder / "packed.dcm")
                    image.filename, voxels = one.path, image.PixelData
                _write(_plain_slice(one, image, voxels, number, uid), folder / _name(number))
        except (*DAMAGED_HEADER, RuntimeError) as error:
            words = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            reason = words if not isinstance(error, RuntimeError) else "SimpleITK can't decode its voxels"
            raise UserError(
                f"{stack.label}: {one.path.name} cannot be read ({reason}): truncated or of an unknown compression, "
                "export the series again, uncompressed"
            ) from error
    return folder


def _read_uncompressed(path: Path, temporary: Path) -> FileDataset:
    """The image with its voxels as stored, little-endian. ValueError where there are fewer than its size needs."""
    with open_dicom(path) as file:
        image = pydicom.dcmread(file, force=True)
    if "PixelData" not in image:
        raise ValueError("no voxels")
    if is_compressed(image):
        _unpack(image, temporary)
    elif not image.original_encoding[1]:  # big-endian
        image.PixelData = np.frombuffer(image.PixelData, f">u{image.BitsAllocated // 8}").byteswap().tobytes()
    found, needed = len(image.PixelData), voxel_bytes(image)
    if found < needed:
        raise ValueError(f"{found} bytes of voxels where its size needs {needed}")
    return image


def _unpack(image: FileDataset, temporary: Path) -> None:
    """Replaces compressed voxels by the stored values."""
    if image.file_meta.TransferSyntaxUID == RLELossless:
        image.decompress()  # which SimpleITK refuses for some sizes
        return
    part = _tags_of(image, *PIXEL_TAGS, "NumberOfFrames")
    part.PhotometricInterpretation, part.SOPClassUID = "MONOCHROME2", SecondaryCaptureImageStorage
    part.SOPInstanceUID = generate_uid()
    part.PixelData = image.PixelData
    part["PixelData"].is_undefined_length = True
    _write(part, temporary, image.file_meta.TransferSyntaxUID)
    values = sitk.GetArrayFromImage(sitk.ReadImage(temporary))
    temporary.unlink()
    stored = np.dtype(f"{'i' if image.PixelRepresentation else 'u'}{image.BitsAllocated // 8}")
    image.PixelData = values.astype(stored).tobytes()


def _plain_slice(one: Slice, image: FileDataset, voxels: bytes, number: int, uid: str) -> Dataset:
    """A slice as one of a volume's: of its identifiers, times and purposes nothing that tells it from the others."""
    part = _tags_of(image, *PIXEL_TAGS)
    size = voxel_bytes(image) // one.frames
    part.PixelData = voxels[one.frame * size : (one.frame + 1) * size]
    if has_signed_bytes(image):
        part.PixelData = np.frombuffer(part.PixelData, np.int8).astype("<i2").tobytes()
        part.BitsAllocated = 16
    part.PhotometricInterpretation = "MONOCHROME2"  # how values are shown, not what they are
    part.Modality = one.modality
    part.SOPClassUID = CTImageStorage if one.modality == "CT" else MRImageStorage
    part.SOPInstanceUID = generate_uid()
    part.StudyInstanceUID = part.SeriesInstanceUID = uid
    part.SeriesNumber, part.InstanceNumber = 1, number + 1
    part.RescaleSlope, part.RescaleIntercept = _decimals([one.slope, one.intercept or 0.0])
    part.PixelSpacing = _decimals(one.spacing)
    part.ImagePositionPatient, part.ImageOrientationPatient = _decimals(one.position), _decimals(one.orientation)
    return part


def _tags_of(image: FileDataset, *names: str) -> Dataset:
    """These elements alone, as far as the image has them."""
    part = Dataset()
    for name in names:
        if name in image:
            part[name] = image[name]
    return part


def _decimals(numbers: Sequence[float]) -> list[DSfloat]:
    return [DSfloat(number, auto_format=True) for number in numbers]


def _write(part: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = part.SOPClassUID, part.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    plain = FileDataset(str(path), part, preamble=b"\0" * 128, file_meta=meta)
    plain.save_as(path, enforce_file_format=True)


# Order


def _in_order_of_headers(stack: Stack, data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The voxels with each axis in the headers' direction: dcm2niix turns rows, and sometimes slices, around.

    UserError: the volume lies elsewhere than the headers say.
    """
    directions = (affine[:3, :3] / spacing_of(affine)).T @ (stack.affine[:3, :3] / spacing_of(stack.affine))  # cosines
    signs = np.sign(np.diagonal(directions))
    first = np.where(signs > 0, 0, np.array(data.shape) - 1)
    beside = np.linalg.solve(stack.affine[:3, :3], affine[:3, :3] @ first + affine[:3, 3] - stack.affine[:3, 3])
    if np.abs(np.diagonal(directions)).min() < np.sqrt(0.5) or np.abs(beside).max() > NEAR:
        raise UserError(
            f"{stack.label}: dcm2niix places its first voxel {size_text(np.rint(np.abs(beside)))} voxels from where "
            "position and orientation in the headers do: which is right is not known, export the series again"
        )
    return np.ascontiguousarray(data[tuple(slice(None, None, int(sign)) for sign in signs)])
