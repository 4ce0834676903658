"""What a NIfTI header says, and how the voxels lie in the file. Odd fields are refused by their names."""

import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from common.errors import UserError
from dataset.volumes.geometry import orientation_of, size_text
from dataset.volumes.nifti_geometry import read_geometry

FLAG_BYTES = 4  # after the header: whether extensions follow
HEADER_BYTES = 540 + FLAG_BYTES  # the longer of the two NIfTI headers: 348 (NIfTI-1), 540 (NIfTI-2)
NIFTI2_STARTS = ((540).to_bytes(4, "little"), (540).to_bytes(4, "big"))
NIFTI_STARTS = ((348).to_bytes(4, "little"), (348).to_bytes(4, "big"), *NIFTI2_STARTS)
IMPLAUSIBLE = 1000  # times as large as it is no file should have been
UNITS = {1: "meter", 2: "mm", 3: "micron"}  # codes of lengths; others are not defined


@dataclass(frozen=True)
class Header:
    """What a file says of itself, without its voxels.

    shape: the array's axes as stored, trailing axes of length 1 after the third removed, e.g. (X, Y, Z).
    affine: voxel indices to millimetres in RAS, (4, 4) float64.
    spacing_mm: voxel size (x, y, z); without an affine in the header the plain numbers stated there, whatever they are.
    is_oriented: whether the header has an affine (qform or sform); without one the directions of the axes are a guess.
    unit: what the header counts lengths in: "mm", "meter", "micron" or "unknown"; affine and spacing are as stated.
    notes: which of two geometries was taken, where they are not the same.
    geometry_fault: why the affine can't be trusted, naming the fields; empty where it can.
    """

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    is_oriented: bool
    unit: str = "unknown"
    notes: tuple[str, ...] = ()
    geometry_fault: str = ""

    @property
    def tensor_shape(self) -> tuple[int, int, int]:
        """(D, H, W) of a volume."""
        x, y, z = self.shape
        return (z, x, y)

    @property
    def orientation(self) -> str:
        """Where the axes x, y, z point, nearest directions of the patient: "RAS" is right, anterior, superior."""
        return orientation_of(self.affine)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, d, h, w) of a latent."""
        return (self.shape[-1] if len(self.shape) > 3 else 1, *self.shape[:3])


@dataclass(frozen=True)
class Layout:
    """How the voxels lie in a file, uncompressed: from byte `offset` on, x fastest, values times slope plus intercept.

    first_byte: where they begin at the earliest. is_vector: the header calls its fourth axis a vector's, not time.
    is_pair: it is the header of a pair of files.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    first_byte: int
    slope: float
    intercept: float
    is_vector: bool
    is_pair: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of voxels."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Where the voxels end."""
        return self.offset + self.num_bytes

    def check_size(self, path: Path, size: int, is_exact: bool = True) -> None:
        """UserError: the file, of `size` bytes uncompressed, or at most so many, doesn't hold all voxels."""
        if size >= self.end:
            return
        if self.is_pair:
            raise _pair_error(path)
        at_most = "" if is_exact else "at most "
        if size >= self.first_byte + self.num_bytes:
            raise UserError(
                f"{path}: vox_offset is {self.offset:.12g}, but {self.num_bytes} bytes of voxels in a file of "
                f"{at_most}{size} begin at byte {size - self.num_bytes} at the latest: correct it, {self.first_byte} "
                "without header extensions"
            )
        what = f"{size_text(self.shape)} voxels of type {self.dtype.name} from byte {self.offset:.12g} (vox_offset)"
        if self.end > IMPLAUSIBLE * size:
            raise UserError(
                f"{path}: dim says {what}, {self.end:.12g} bytes, but the file has {at_most}{size}: the header is "
                "damaged, or nearly all of the file is missing: copy or make it again"
            )
        raise UserError(
            f"{path}: the file is truncated: {at_most}{size} bytes, {self.end:.12g} are needed for {what}: copy or "
            "make it again"
        )


def parse_header(path: Path, content: bytes) -> tuple[Header, Layout]:
    """The header that a file begins with, uncompressed; HEADER_BYTES are enough.

    UserError: no NIfTI, cut off within the header, an empty axis, a field without which the voxels can't be read.
    """
    raw = _raw_header(path, content)
    layout = _layout(path, raw, content)
    shape = layout.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    geometry = read_geometry(raw, layout.shape)
    unit = UNITS.get(int(raw["xyzt_units"]) & 7, "unknown")
    spacing = tuple(float(length) for length in geometry.spacing)
    header = Header(path, shape, geometry.affine, spacing, geometry.is_oriented, unit, geometry.notes, geometry.fault)
    return header, layout


def _raw_header(path: Path, content: bytes) -> nib.Nifti1Header:
    """The fields as they stand in the file."""
    start, magic = content[:4], content[344:348]
    if start not in NIFTI_STARTS and magic not in (b"n+1\0", b"ni1\0"):
        found = f"begins with {content[:16]!r}" if content else "is empty"
        raise UserError(f"{path}: not a NIfTI image: the file {found}, a whole .nii.gz file is needed")
    kind = nib.Nifti2Header if start in NIFTI2_STARTS else nib.Nifti1Header
    size = kind.sizeof_hdr
    if len(content) < size:
        raise UserError(
            f"{path}: the file is truncated: {len(content)} of {size} bytes of header: copy or make it again"
        )
    endianness = "<>"[NIFTI_STARTS.index(start) % 2] if start in NIFTI_STARTS else None  # None: nibabel guesses
    raw = kind(content[:size], endianness, check=False)
    magic = raw["magic"].item()
    if magic not in (kind.single_magic, kind.pair_magic):
        raise UserError(
            f"{path}: magic is {magic!r} in place of {kind.single_magic!r}: an Analyze header, which doesn't say where "
            "left is, or a damaged one: convert the images to one .nii.gz file each"
        )
    return raw


def _layout(path: Path, raw: nib.Nifti1Header, content: bytes) -> Layout:
    if not 0 <= raw["dim"][0] <= 7:
        raise UserError(f"{path}: dim[0] is {raw['dim'][0]}, 1 to 7 axes are possible: the header is damaged")
    shape = tuple(int(extent) for extent in raw.get_data_shape())
    if not shape or min(shape) < 1:
        raise UserError(f"{path}: the image is empty (size {size_text(shape) or 0}): replace or remove the file")
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or not math.isfinite(slope):  # as the standard has it: not scaled
        slope, intercept = 1.0, 0.0
    if not math.isfinite(intercept):
        raise UserError(
            f"{path}: scl_inter is {intercept} (scl_slope {slope:g}): what is to be added to the voxels is not known; "
            "correct it, 0 for nothing"
        )
    is_pair = raw["magic"].item() == raw.pair_magic
    offset, first_byte = _offset(path, raw, content, is_pair)
    is_vector = bool(raw["intent_code"] != 0)
    return Layout(shape, _voxel_type(path, raw), offset, first_byte, slope, intercept, is_vector, is_pair)


def _voxel_type(path: Path, raw: nib.Nifti1Header) -> np.dtype:
    code = int(raw["datatype"])
    try:
        dtype = raw.get_data_dtype()
    except KeyError:
        dtype = np.dtype("V0")
    if dtype.itemsize == 0:
        raise UserError(
            f"{path}: datatype is {code}{' (single bits)' if code == 1 else ''}, not a type of whole bytes: write the "
            "file again with voxels of e.g. int16 or float32"
        )
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: voxels of type {dtype} (colour or complex): one number a voxel is needed")
    return dtype


def _offset(path: Path, raw: nib.Nifti1Header, content: bytes, is_pair: bool) -> tuple[int, int]:
    """Where the voxels begin, and where they do at the earliest."""
    stated, first_byte = float(raw["vox_offset"]), raw.sizeof_hdr + FLAG_BYTES
    if stated == first_byte or (stated > first_byte and stated.is_integer()):
        return int(stated), first_byte
    if is_pair:
        raise _pair_error(path)
    has_extensions = any(content[raw.sizeof_hdr : raw.sizeof_hdr + 1])
    if stated == 0 and not has_extensions:  # that is how some programs say "after the header"
        return first_byte, first_byte
    raise UserError(
        f"{path}: vox_offset is {stated:g}{' beside header extensions' if stated == 0 else ''}, voxels begin at byte "
        f"{first_byte} or later, after the header: correct it, or make the file again from its source"
    )


def _pair_error(path: Path) -> UserError:
    return UserError(
        f"{path}: the header of a pair of files (.hdr and .img), without voxels: convert the pair to one .nii.gz file"
    )
