"""Where the slices of a DICOM series lie: along their normal, one position twice, evenly or not.

Patient coordinates are LPS in mm.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from dataset.preparation.dicom_header import Slice, open_dicom
from dataset.volumes.geometry import SMALLEST_SPACING_MM

MIN_SLICES = 5  # fewer images are a localiser or a screenshot, not a volume
EVEN_TOLERANCE = 0.1  # share of the slice spacing by which a slice may lie beside its place in an even grid
SAME_PLACE_MM = SMALLEST_SPACING_MM  # images nearer to each other are of one position


def place_of(image: Slice) -> tuple[float, str, int]:
    """Sorts along the slice normal."""
    if image.position is None or image.orientation is None:
        return 0.0, str(image.path), image.frame
    return float(np.dot(normal_of(image), image.position)), str(image.path), image.frame


def normal_of(image: Slice) -> np.ndarray:
    row, column = directions_of(image)
    normal = np.cross(row, column)
    return normal / max(np.linalg.norm(normal), 1e-9)


def directions_of(image: Slice) -> np.ndarray:
    """Unit vectors along a row and along a column, (2, 3)."""
    directions = np.array(image.orientation).reshape(2, 3)
    return directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-9)


def has_no_position_twice(slices: Sequence[Slice]) -> bool:
    return len(group_by_position(slices)) == len(slices)


def is_even(slices: Sequence[Slice]) -> bool:
    is_placed = all(image.position and image.orientation for image in slices)
    return is_placed and len(slices) >= MIN_SLICES and has_no_position_twice(slices) and not unevenness(slices)


def group_by_position(slices: Sequence[Slice]) -> dict[Any, list[Slice]]:
    """Images by their position but for rounding, in their order; those without one together."""
    by_position: dict[Any, list[Slice]] = {}
    ends: list[tuple[float, tuple[float, ...]]] = []  # of the positions so far, the place along the normal
    for image in sorted(slices, key=place_of):
        place, near = place_of(image)[0], None
        if image.position is not None:
            for other, position in reversed(ends):
                if place - other > SAME_PLACE_MM:
                    break
                if np.linalg.norm(np.subtract(position, image.position)) <= SAME_PLACE_MM:
                    near = position
                    break
            if near is None:
                ends.append((place, image.position))
                near = image.position
        by_position.setdefault(near, []).append(image)
    return by_position


def are_copies(images: Sequence[Slice]) -> bool:
    """Whether the voxels of all these images are the same in real units. Images without a position are not compared."""
    if len(images) == 1 or images[0].position is None:
        return True
    if images[0].frames > 1 or len({(image.slope, image.intercept or 0.0) for image in images}) > 1:
        return False
    return len({_pixel_digest(image.path) for image in images}) == 1


def _pixel_digest(path: Path) -> bytes:
    with open_dicom(path) as file:
        return hashlib.sha256(pydicom.dcmread(file, force=True).get("PixelData") or b"").digest()


def step_of(slices: Sequence[Slice]) -> np.ndarray:
    """The step from slice to slice in mm, LPS."""
    return np.subtract(slices[-1].position, slices[0].position) / (len(slices) - 1)


def unevenness(slices: Sequence[Slice]) -> str | None:
    """What keeps slices, in the order of their positions, from being an even stack."""
    positions = np.array([image.position for image in slices])
    gaps = np.diff(positions @ normal_of(slices[0]))
    usual = float(np.median(gaps))
    off = np.abs(positions - (positions[0] + np.arange(len(slices))[:, None] * step_of(slices))).max()
    if usual <= 0:
        return "the slices do not follow each other (slice spacing of zero)"
    if max(np.abs(gaps - usual).max(), off) <= EVEN_TOLERANCE * usual:
        return None
    worst = int(np.abs(gaps - usual).argmax())
    return (
        f"slices are not evenly spaced: mostly {usual:g} mm, but {gaps[worst]:g} mm between {slices[worst].path.name} "
        f"and {slices[worst + 1].path.name}: slices are missing, or two stacks are mixed"
    )
