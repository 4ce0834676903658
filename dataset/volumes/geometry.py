"""Affines of volumes: voxel indices (x, y, z) to millimetres in RAS (right, anterior, superior), (4, 4) float64."""

from collections.abc import Sequence

import nibabel as nib
import numpy as np

from common.errors import UserError

# Beyond these a spacing is a mistake, mostly of units.
SMALLEST_SPACING_MM, LARGEST_SPACING_MM = 0.05, 20.0
PLAUSIBLE_SPACING = f"{SMALLEST_SPACING_MM:g} to {LARGEST_SPACING_MM:g} mm"
SHEAR = 0.01  # cosine between two axes, about 0.6 degrees; a tilted CT gantry gives 0.1 and more


def affine_from_spacing(spacing_mm: Sequence[float]) -> np.ndarray:
    """(4, 4) affine of a RAS volume with the given voxel size (x, y, z) in millimetres and its origin at 0."""
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    if spacing.shape != (3,) or not np.all(np.isfinite(spacing)) or np.any(spacing <= 0):
        raise UserError(f"spacing {list(spacing_mm)}: three positive numbers in mm are needed, x y z")
    return np.diag([*spacing, 1.0])


def centred_affine(spacing_mm: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """As `affine_from_spacing`, the middle of the volume at 0. size: (D, H, W) of the tensor."""
    return crop_affine(affine_from_spacing(spacing_mm), [(1 - extent) / 2 for extent in size])


def crop_affine(affine: np.ndarray, start: Sequence[int]) -> np.ndarray:
    """The affine of a crop that begins at voxel `start` = (d, h, w) of the tensor; negative where it was padded."""
    cropped = np.array(affine, dtype=np.float64)
    d, h, w = start
    cropped[:3, 3] += cropped[:3, :3] @ np.array([h, w, d], dtype=np.float64)
    return cropped


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size (x, y, z) in mm, (3,)."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def directions_of(affine: np.ndarray) -> np.ndarray:
    """Where the axes x, y, z point: unit vectors in the columns, (3, 3)."""
    return affine[:3, :3] / spacing_of(affine)


def orientation_of(affine: np.ndarray) -> str:
    """Where the axes x, y, z point, by the nearest directions of the patient; "???" where that can't be told."""
    if not np.isfinite(affine).all():
        return "???"
    return "".join(code or "?" for code in nib.aff2axcodes(affine))


def affine_of_orientation(orientation: str, spacing_mm: Sequence[float]) -> np.ndarray:
    """The affine of a volume whose axes point to e.g. "LPS", its origin at 0."""
    affine = np.zeros((4, 4))
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(tuple(orientation))):
        affine[int(world), axis] = sign * spacing_mm[axis]
    affine[3, 3] = 1
    return affine


def is_plausible_spacing(spacing_mm: Sequence[float]) -> bool:
    """Whether voxels of this size can be those of a scan."""
    return all(SMALLEST_SPACING_MM <= length <= LARGEST_SPACING_MM for length in spacing_mm)


def shear_of(affine: np.ndarray) -> float:
    """Largest cosine between two axes: 0 where all are at right angles, above SHEAR where slices are shifted."""
    axes = directions_of(affine)
    return float(np.abs(axes.T @ axes - np.eye(3)).max())


def size_text(extents: Sequence[int]) -> str:
    """A size for messages: "512x512x300"."""
    return "x".join(str(int(extent)) for extent in extents)


def mm_text(lengths_mm: Sequence[float]) -> str:
    """Lengths for messages: "0.7 x 0.7 x 1 mm"."""
    return " x ".join(f"{length:g}" for length in lengths_mm) + " mm"
