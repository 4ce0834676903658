"""Reading and writing NIfTI files: the only place that knows their axes and what a sound volume is.

Axes: a NIfTI volume is (X, Y, Z); a tensor is (1, D, H, W) with D = Z, H = X, W = Y.
Latents are stored without permutation: a (C, d, h, w) tensor is a NIfTI image (d, h, w, C), which TorchIO reads as that
tensor. What TorchIO itself writes, a vector image (d, h, w, 1, C), is read too.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from einops import rearrange
from nibabel.arrayproxy import ArrayProxy

from common.errors import UserError
from common.files import write_atomically
from common.memory import free_main_memory
from dataset.volumes.geometry import size_text
from dataset.volumes.gzip_files import compress, first_bytes, whole_bytes
from dataset.volumes.intensity import RANGE_TOLERANCE, is_empty, to_model_range
from dataset.volumes.nifti_header import HEADER_BYTES, Header, Layout, parse_header

NIFTI_SUFFIXES = (".nii.gz", ".nii")
LARGE = 2**30  # bytes from which it is asked whether there is memory for them
LARGEST_CODE = 32767  # codes of scaled int16 volumes lie between its negative and it


class NotFiniteError(UserError):
    """A file with NaN or infinite voxels."""


@dataclass(frozen=True)
class Volume:
    """data: (1, D, H, W) float32, values as on disk; affine: (4, 4) float64."""

    data: torch.Tensor
    header: Header

    @property
    def affine(self) -> np.ndarray:
        return self.header.affine

    @property
    def path(self) -> Path:
        return self.header.path


# Axes


def nifti_to_tensor(volume: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """(..., X, Y, Z) -> (..., Z, X, Y), that is (..., D, H, W). A view."""
    return rearrange(volume, "... x y z -> ... z x y")


def tensor_to_nifti(volume: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """(..., D, H, W) -> (..., X, Y, Z), the inverse of `nifti_to_tensor`. A view."""
    return rearrange(volume, "... z x y -> ... x y z")


def turned_to_ras(data: torch.Tensor, affine: np.ndarray) -> tuple[torch.Tensor, np.ndarray]:
    """A volume (1, D, H, W) with its axes in the order right, front, head, each the nearest one, and its affine.

    As it is where the affine tells no directions.
    """
    turn = nib.io_orientation(affine)
    if not np.isfinite(turn).all():
        return data, affine
    array = tensor_to_nifti(_to_array(data)[0])  # (X, Y, Z)
    turned = nib.apply_orientation(array, turn)
    return _to_tensor(nifti_to_tensor(turned))[None], affine @ nib.orientations.inv_ornt_aff(turn, array.shape)


# Volumes


def read_header(path: str | Path) -> Header:
    """The header of a three-dimensional, one-channel volume, without reading its voxels.

    UserError: missing file, no NIfTI, cut off within the header, 2D, 4D, several channels, an empty axis.
    """
    header, layout = _open(path)
    _check_volume(header, layout)
    return header


def read_nifti(path: str | Path) -> tuple[np.ndarray, Header]:
    """The voxels (X, Y, Z) of a volume as they are on disk, float32, for work in the file's own axes.

    UserError: as `read_header`, and truncated files, NaN or infinity.
    """
    header, layout = _open(path)
    _check_volume(header, layout)
    return _voxels(header.path, layout).reshape(header.shape), header


def read_volume(path: str | Path) -> Volume:
    """A volume with the values it has on disk. UserError: as `read_nifti`."""
    array, header = read_nifti(path)
    return Volume(_to_tensor(nifti_to_tensor(array))[None], header)  # (1, D, H, W)


def read_model_volume(path: str | Path, intensity_range: Sequence[float]) -> Volume:
    """A volume in the model's range [-1, 1].

    UserError: as `read_volume`, values outside `intensity_range`, and volumes in which there is nothing to see: all
    background, or one value everywhere.
    """
    volume = read_volume(path)
    data = to_model_range(volume.data, intensity_range, path)
    if is_empty(data):
        raise UserError(f"{path}: all background (every voxel is {float(volume.data.max()):g}): remove the file")
    return Volume(data, volume.header)


def write_volume(
    path: str | Path,
    data: torch.Tensor | np.ndarray,
    affine: "np.ndarray | torch.Tensor | Volume",
    dtype: str = "float32",
    value_range: Sequence[float] | None = None,
    is_whole_units: bool = False,
) -> None:
    """Writes (D, H, W) or (1, D, H, W) as NIfTI (X, Y, Z), so that readers get the values back.

    The file appears under its name only when it is whole. UserError if it cannot be written.

    Args:
        affine: or the volume whose place the data take, e.g. the one that was encoded; ValueError for data of another
            size, such as those whose axes are not (D, H, W).
        dtype: "float32": values as they are; "int16": half the size, values within half a code.
        value_range: lowest and highest value that the data can have; needed for int16, whose codes depend on it alone
            and not on the data.
        is_whole_units: int16 holds the values themselves, rounded, if the range allows it (HU); otherwise, and without,
            there are 65,535 codes over the range, with slope and intercept in the header.
    """
    array = _to_array(data)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"{path}: a volume (D, H, W) or (1, D, H, W) is needed, got shape {tuple(array.shape)}")
    if isinstance(affine, Volume):
        if array.shape != affine.header.tensor_shape:
            raise ValueError(
                f"{path}: data {tuple(array.shape)}, but {affine.path} has (D, H, W) = {affine.header.tensor_shape}, "
                "D = z, H = x, W = y: crop what was padded (crop_to), or turn NIfTI's X, Y, Z (nifti_to_tensor)"
            )
        affine = affine.affine
    array = tensor_to_nifti(array)
    if dtype == "float32":
        write_nifti(path, array, affine)
    elif dtype == "int16":
        _check_range(path, array, value_range)
        slope, intercept = int16_scale(value_range, is_whole_units)
        codes = _by_slice(array, np.int16, lambda voxels: _int16_codes(voxels, value_range, slope, intercept))
        _write(path, _image(codes, affine, slope, intercept))
    else:
        raise ValueError(f"{path}: dtype {dtype!r}: float32 or int16 is needed")


def write_nifti(path: str | Path, data: np.ndarray, affine: np.ndarray | torch.Tensor) -> None:
    """Writes (X, Y, Z), NIfTI's own axes, as float32; otherwise as `write_volume`."""
    _write(path, _image(_by_slice(data, np.float32, lambda voxels: voxels), affine))


def _image(stored: np.ndarray, affine: np.ndarray | torch.Tensor, slope=1.0, intercept=0.0) -> nib.Nifti1Image:
    image = nib.Nifti1Image(stored, _to_array(affine, np.float64))
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(slope, intercept)
    return image


def int16_scale(value_range: Sequence[float], is_whole_units: bool = False) -> tuple[float, float]:
    """Slope and intercept, as a header holds them (float32), of int16 codes for values of this range."""
    low, high = value_range
    if is_whole_units and low >= np.iinfo(np.int16).min and high <= np.iinfo(np.int16).max:
        return 1.0, 0.0
    return float(np.float32((high - low) / (2 * LARGEST_CODE))), float(np.float32((low + high) / 2))


def int16_read_back(array: np.ndarray, value_range: Sequence[float], is_whole_units: bool = False) -> np.ndarray:
    """What readers get of values (any shape) that `write_volume` writes as int16, float32."""
    slope, intercept = int16_scale(value_range, is_whole_units)
    codes = _int16_codes(array, value_range, slope, intercept)
    return (codes * slope + intercept).astype(np.float32)


def _check_range(path: str | Path, array: np.ndarray, value_range: Sequence[float]) -> None:
    low, high = value_range
    tolerance = RANGE_TOLERANCE * (high - low)
    if not (low - tolerance <= array.min() and array.max() <= high + tolerance):  # also NaN
        raise ValueError(f"{path}: values {array.min():g} to {array.max():g} outside the range [{low:g}, {high:g}]")


def _int16_codes(voxels: np.ndarray, value_range: Sequence[float], slope: float, intercept: float) -> np.ndarray:
    """The nearest codes, still as float64."""
    limits = np.iinfo(np.int16)
    exact = voxels.astype(np.float64)
    np.clip(exact, *value_range, out=exact)
    exact -= intercept
    exact /= slope
    return np.clip(np.rint(exact, out=exact), limits.min, limits.max, out=exact)


def _by_slice(array: np.ndarray, dtype: type, convert: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`convert` of each slice of (X, Y, Z), laid out as a file is: x changes fastest, then y, then z.

    A slice stays in the processor's cache, which a whole volume converted and turned step by step does not.
    """
    stored = np.empty(array.shape, dtype, order="F")
    for z in range(array.shape[2]):
        stored[..., z] = convert(array[..., z]).astype(dtype, copy=False)  # to cast and turn at once takes longer
    return stored


# Latents


def read_latent_header(path: str | Path) -> Header:
    """The header of a latent: NIfTI (d, h, w, C), TorchIO's (d, h, w, 1, C) or, with one channel, (d, h, w)."""
    header, _ = _open(path)
    _check_latent(header)
    return header


def read_latent(path: str | Path) -> torch.Tensor:
    """A latent (C, d, h, w), float32. UserError: as `read_volume`."""
    header, layout = _open(path)
    _check_latent(header)
    channels, *grid = header.latent_shape
    array = _voxels(header.path, layout).reshape(*grid, channels)
    return _to_tensor(np.moveaxis(array, -1, 0))  # (C, d, h, w)


def write_latent(path: str | Path, latent: torch.Tensor | np.ndarray) -> None:
    """Writes a (C, d, h, w) latent as a NIfTI image (d, h, w, C).

    The file appears under its name only when it is whole.
    """
    array = _to_array(latent)
    if array.ndim != 4:
        raise ValueError(f"{path}: a latent (C, d, h, w) is needed, got shape {tuple(array.shape)}")
    _write(path, nib.Nifti1Image(np.ascontiguousarray(np.moveaxis(array, 0, -1)), np.eye(4)))


def is_whole_volume(path: str | Path) -> bool:
    """Whether a sound volume lies under this name, so that it need not be made again. Reads the whole file."""
    try:
        read_volume(path)
    except UserError:
        return False
    return True


# Checks


def _check_volume(found: Header, layout: Layout) -> None:
    shape = found.shape
    if len(shape) < 3 or min(shape[:3]) == 1:
        raise UserError(f"{found.path}: a 2D image (size {size_text(shape)}): a three-dimensional volume is needed")
    if len(shape) > 3:
        several = "several channels" if len(shape) > 4 or layout.is_vector else "a 4D series"
        raise UserError(
            f"{found.path}: {several} (size {size_text(shape)}): a volume with one channel is needed, "
            "split the file into one file for each channel or time point"
        )


def _check_latent(found: Header) -> None:
    shape = found.shape
    if len(shape) < 3 or len(shape) > 5 or (len(shape) == 5 and shape[3] != 1):
        raise UserError(
            f"{found.path}: size {size_text(shape)} is not that of a latent (d, h, w, channels): "
            "make latents with train/generate_training_latent.py"
        )


# Bytes


def _open(path: str | Path) -> tuple[Header, Layout]:
    """What a file says of itself, and how its voxels lie in it. UserError: more than can be in a file of its size."""
    path = Path(path)
    start, most_bytes = first_bytes(path, HEADER_BYTES)
    header, layout = parse_header(path, start)
    layout.check_size(path, most_bytes, is_exact=False)
    return header, layout


def _voxels(path: Path, layout: Layout) -> np.ndarray:
    """The voxels as float32, scaled as the header says."""
    needed = layout.end + math.prod(layout.shape) * np.dtype(np.float32).itemsize
    if needed > LARGE and needed > (free := free_main_memory()):
        raise UserError(
            f"{path}: {size_text(layout.shape)} voxels of type {layout.dtype.name} take {needed / 1e9:.3g} GB of "
            f"memory, {free / 1e9:.3g} GB are free: cut the image into smaller ones, or correct its header"
        )
    try:
        return _read_voxels(path, layout)
    except MemoryError as error:
        raise UserError(
            f"{path}: {needed / 1e9:.3g} GB of memory are needed and not free: take a smaller image"
        ) from error


def _read_voxels(path: Path, layout: Layout) -> np.ndarray:
    content = whole_bytes(path, layout.end)
    layout.check_size(path, len(content))
    fields = (layout.shape, layout.dtype, layout.offset, layout.slope, layout.intercept)
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite and is reported below
        array = np.asarray(ArrayProxy(io.BytesIO(content), fields, mmap=False), dtype=np.float32)
    if not np.isfinite(array.sum(dtype=np.float64)):  # NaN or infinity anywhere; needs no mask as large as the volume
        count = array.size - np.count_nonzero(np.isfinite(array))
        raise NotFiniteError(f"{path}: {count} NaN or infinite voxels: replace them, e.g. by the background value")
    return array


def _to_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _to_array(data: torch.Tensor | np.ndarray, dtype: type = np.float32) -> np.ndarray:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().to(torch.float64 if dtype == np.float64 else torch.float32).numpy()
    return np.asarray(data, dtype=dtype)


def _write(path: str | Path, image: nib.Nifti1Image) -> None:
    path = Path(path)
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise UserError(f"{path}: the name of a NIfTI file ends in .nii.gz")
    image.header["qform_code"], image.header["sform_code"] = 1, 1
    content = image.to_bytes()
    write_atomically(path, compress(content) if path.suffix == ".gz" else content)
