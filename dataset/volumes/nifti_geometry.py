"""Which of the two geometries of a NIfTI header counts.

A header states where its voxels lie twice: as an affine (sform: srow_x, srow_y, srow_z) and as a turn and voxel sizes
(qform: quatern_b, quatern_c, quatern_d, pixdim), each with a code that is 0 where nobody filled it in. Many programs
fill in one of them and leave zeros or a stub in the other, and later ones may correct one alone.
"""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from dataset.volumes.geometry import SHEAR, directions_of, mm_text, orientation_of, shear_of, spacing_of

QUATERNION_ROUNDING = 1e-3  # by which its length may exceed 1
SAME_SPACING = 0.01  # relative
ALIGNED_DEG = 1.0  # between an axis of the sform and of the qform: they are the same
TURNED_DEG = 45.0  # more is no alignment of one scan with another: the axis points elsewhere
FLAT = 1e-3  # volume that three axes of length 1 span, below which they lie in one plane
SFORM, QFORM = "sform (srow_x, srow_y, srow_z)", "qform (quatern_b, quatern_c, quatern_d, pixdim)"


@dataclass(frozen=True)
class Geometry:
    """affine: voxel indices to the header's unit of length in RAS, (4, 4). The other fields as in `Header`."""

    affine: np.ndarray
    spacing: np.ndarray
    is_oriented: bool = True
    notes: tuple[str, ...] = ()
    fault: str = ""


def read_geometry(raw: nib.Nifti1Header, shape: tuple[int, ...]) -> Geometry:
    """The sform where it is sound, otherwise the qform, otherwise a guess.

    A fault says that there is only a guess, or that the two contradict each other. Whether sizes are possible ones is
    not judged here unless there are two.
    raw: the fields as they stand in the file. shape: the image's, of any number of axes.
    """
    sizes = np.array(raw["pixdim"][1:4], dtype=np.float64)
    sform, sform_fault = _sform(raw)
    qform, qform_fault = _qform(raw, sizes)
    # A stub: voxels of 1 along the patient's axes, beside real sizes in the other.
    if sform is not None and _is_identity(sform) and _are_lengths(sizes) and not _are_ones(sizes):
        sform, sform_fault = None, f"{SFORM} is the identity, but pixdim {mm_text(sizes)}"
    elif sform is not None and qform is not None and _is_identity(qform) and not _are_ones(spacing_of(sform)):
        qform, qform_fault = None, f"{QFORM} is the identity"
    elif sform is not None and qform is not None and not _are_lengths(sizes):
        qform, qform_fault = None, f"{QFORM} has no sizes, pixdim {mm_text(sizes)}"
    if sform is None and qform is None:
        faults = [fault for fault in (sform_fault, qform_fault) if fault]
        return Geometry(_guess(sizes, shape), sizes, False, fault="; ".join(faults) or "qform and sform code are 0")
    if sform is None:
        return Geometry(qform, sizes, notes=(f"{sform_fault}: qform taken",) if sform_fault else ())
    if qform is None:
        notes, other = (f"{qform_fault}: sform taken",) if qform_fault else (), "pixdim"
        is_contradicted = _are_lengths(sizes) and not _are_ones(sizes) and not _is_spacing_of(sform, sizes)
    else:
        notes, other = _turn_notes(sform, qform), "qform"
        if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0 or _turn(sform, qform) > TURNED_DEG:
            fault = f"axes {orientation_of(sform)} by the sform, {orientation_of(qform)} by the qform"
            return Geometry(sform, spacing_of(sform), fault=fault)
        is_contradicted = not _is_spacing_of(sform, sizes)
    fault = f"spacing {mm_text(spacing_of(sform))} by the sform, {mm_text(sizes)} by the {other}"
    return Geometry(sform, spacing_of(sform), notes=notes, fault=fault if is_contradicted else "")


# The two, None with the reason where they are unusable; without a reason where the code says that there is none


def _sform(raw: nib.Nifti1Header) -> tuple[np.ndarray | None, str]:
    if raw["sform_code"] <= 0:
        return None, ""
    affine = np.eye(4)
    affine[:3] = [raw["srow_x"], raw["srow_y"], raw["srow_z"]]
    if not np.isfinite(affine).all():
        return None, f"{SFORM} is not finite"
    if not affine[:3, :3].any():
        return None, f"{SFORM} is zero"
    if not spacing_of(affine).all() or abs(np.linalg.det(directions_of(affine))) < FLAT:
        return None, f"{SFORM} is singular"
    return affine, ""


def _qform(raw: nib.Nifti1Header, sizes: np.ndarray) -> tuple[np.ndarray | None, str]:
    if raw["qform_code"] <= 0:
        return None, ""
    vector = np.array([raw["quatern_b"], raw["quatern_c"], raw["quatern_d"]], dtype=np.float64)
    offset = np.array([raw["qoffset_x"], raw["qoffset_y"], raw["qoffset_z"]], dtype=np.float64)
    length = np.linalg.norm(vector)
    if not np.isfinite([*vector, *offset]).all():
        return None, f"{QFORM} is not finite"
    if length > 1 + QUATERNION_ROUNDING:
        return None, f"{QFORM} is no turn, its quaternion is of length {length:g}"
    turn = nib.quaternions.quat2mat([np.sqrt(max(0.0, 1 - length**2)), *vector])  # normalises
    affine = np.eye(4)
    affine[:3, :3] = turn * _usable(sizes) * [1, 1, -1 if raw["pixdim"][0] < 0 else 1]
    affine[:3, 3] = offset
    return affine, ""


def _guess(sizes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """What nibabel takes without a geometry: sizes alone, x to the left, the origin in the middle."""
    zooms = _usable(sizes) * [-1, 1, 1]
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = -zooms * (np.array([*shape, 1, 1][:3]) - 1) / 2
    return affine


def _usable(sizes: np.ndarray) -> np.ndarray:
    """Sizes for an affine that can be inverted, whatever the header says; the stated ones are judged elsewhere."""
    return np.where(np.isfinite(sizes) & (sizes != 0), np.abs(sizes), 1)


# Comparisons


def _are_lengths(sizes: np.ndarray) -> bool:
    return bool(np.isfinite(sizes).all() and np.all(sizes > 0))


def _are_ones(sizes: np.ndarray) -> bool:
    return np.allclose(sizes, 1, rtol=0, atol=SAME_SPACING)


def _is_identity(affine: np.ndarray) -> bool:
    return np.allclose(affine[:3, :3], np.eye(3), rtol=0, atol=1e-6)


def _is_spacing_of(affine: np.ndarray, sizes: np.ndarray) -> bool:
    """Whether voxels have these sizes; along a sheared axis that may be the distance across or along it."""
    ratio, flatness = sizes / spacing_of(affine), abs(np.linalg.det(directions_of(affine)))
    return bool(np.all((ratio > flatness * (1 - SAME_SPACING)) & (ratio < 1 + SAME_SPACING)))


def _turn(first: np.ndarray, second: np.ndarray) -> float:
    """The largest angle between an axis of one affine and the same of the other, in degrees."""
    cosines = np.sum(directions_of(first) * directions_of(second), axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def _turn_notes(sform: np.ndarray, qform: np.ndarray) -> tuple[str, ...]:
    if _turn(sform, qform) <= ALIGNED_DEG:
        return ()
    how = "is sheared, which a qform can't be" if shear_of(sform) > SHEAR else "is turned against the qform"
    return (f"{SFORM} {how}: sform taken",)
