"""What preprocessing does to one volume: orientation, spacing, size and intensities, by TorchIO and SimpleITK.

Between the first and the last step intensities are in [0, 1] with the background at 0, which is what TorchIO and
SimpleITK put where there is no data.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
import torchio as tio

from common.errors import UserError
from dataset.preparation.manifest import Intensity
from dataset.preparation.measured import check_hounsfield, coarse, find_padding, measured_values
from dataset.preparation.sources import Scan
from dataset.volumes.geometry import SHEAR, mm_text, orientation_of, shear_of, size_text, spacing_of
from dataset.volumes.intensity import MODEL_RANGE

VERSION = 2  # rises when the same recipe gives other volumes
MIN_VOXELS = 4  # per axis: what smoothing before resampling needs
SAME_SPACING = 1e-3  # relative: a smaller difference isn't worth an interpolation
LEAST_CONTRAST = 0.01  # share of the range between the 0.5 and 99.5 percentiles below which there is nothing to see


@dataclass(frozen=True)
class Recipe:
    """How volumes are prepared. Axes are those of NIfTI: x (right), y (front), z (head).

    Exactly one of window and percentiles is set.
    """

    window: tuple[float, float] | None = None  # values mapped to -1 and 1; beyond them is clipped
    percentiles: tuple[float, float] | None = None  # the same with percentiles of each volume
    unit: str | None = None  # "HU": what a window counts in; None = arbitrary units
    spacing_mm: tuple[float, float, float] | None = None  # None: as it is
    size: tuple[int, int, int] | None = None  # voxels after cropping and padding; None: padded to `multiple`
    multiple: int = 64  # where there is no size, each axis is padded to the next multiple of it
    interpolation: str = "linear"  # linear | bspline
    assume_orientation: str | None = None  # axes of NIfTI files without orientation, e.g. "LPS"

    def record(self) -> dict[str, Any]:
        """The recipe as JSON has it. Volumes with equal records were prepared in the same way."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if self.size is not None:
            values["multiple"] = None  # has no effect
        return {**values, "version": VERSION}


@dataclass
class Prepared:
    """data: (X, Y, Z) float32 in [-1, 1]; affine: (4, 4); the others as in the manifest."""

    data: np.ndarray
    affine: np.ndarray
    intensity: Intensity
    steps: list[str] = field(default_factory=list)
    foreground_lost: float = 0.0


def prepare(scan: Scan, recipe: Recipe) -> Prepared:
    """Applies a recipe.

    UserError: too few voxels, nothing to see in the window or between the percentiles, a window in HU for voxels that
    are none.
    """
    if min(scan.data.shape) < MIN_VOXELS:
        raise UserError(f"size {size_text(scan.data.shape)}: at least {MIN_VOXELS} voxels along each axis are needed")
    padding = find_padding(scan.data)
    intensity = find_intensity(scan.data, recipe, padding)
    steps = [*scan.notes, f"{intensity} mapped to [{MODEL_RANGE[0]:g}, {MODEL_RANGE[1]:g}]"]
    scale = np.float32(1 / (intensity.high - intensity.low))
    unit_range = np.clip((scan.data - np.float32(intensity.low)) * scale, 0, 1, dtype=np.float32)
    if padding:
        unit_range[np.isin(scan.data, padding)] = 0
        steps.append(f"padding became background: {', '.join(f'{value:g}' for value in padding)}")
    image = tio.ScalarImage(tensor=torch.from_numpy(unit_range)[None], affine=scan.affine)  # (1, X, Y, Z)
    for step in (_straighten, _reorient, _resample):
        image = step(image, recipe, steps)
    image, lost = _crop_or_pad(image, recipe, steps)
    low, high = MODEL_RANGE
    data = image.data[0].clamp(0, 1) * (high - low) + low  # (X, Y, Z)
    return Prepared(data.numpy(), image.affine, intensity, steps, lost)


def describe(data: np.ndarray, affine: np.ndarray) -> dict[str, Any]:
    """Size, spacing, orientation and range of a volume (X, Y, Z), as the manifest has them."""
    return {
        "size": list(data.shape),
        "spacing_mm": [round(float(length), 6) for length in spacing_of(affine)],
        "orientation": orientation_of(affine),
        "range": [float(data.min()), float(data.max())],
    }


# Intensities


def find_intensity(data: np.ndarray, recipe: Recipe, padding: Sequence[float] = ()) -> Intensity:
    """The values of a volume that become -1 and 1. padding: values that nobody measured."""
    if recipe.percentiles is not None:
        low, high = (float(value) for value in np.percentile(measured_values(data, padding), recipe.percentiles))
        if not low < high:
            raise UserError(
                f"percentiles {recipe.percentiles[0]:g} and {recipe.percentiles[1]:g} are both {low:g}: nearly all "
                "voxels have one value"
            )
        return Intensity("percentiles", low, high)
    low, high = recipe.window
    sample = measured_values(coarse(data)[0], padding)
    bottom, top = np.clip(np.percentile(sample, (0.5, 99.5)), low, high)
    if top - bottom < LEAST_CONTRAST * (high - low):
        raise UserError(
            f"nothing to see in the window {low:g} to {high:g}: 99 % of the voxels lie between {bottom:g} and {top:g} "
            f"after clipping (whole range {data.min():g} to {data.max():g}): are they in other units?"
        )
    if recipe.unit == "HU":
        check_hounsfield(sample, float(data.max()))
    return Intensity("window", low, high, recipe.unit)


# Geometry: each step takes an image with its recipe, adds to the words on what was done, and gives the next image


def _straighten(image: tio.ScalarImage, recipe: Recipe, steps: list[str]) -> tio.ScalarImage:
    """A volume of a tilted gantry, whose slices are shifted against each other, on a grid with right angles."""
    if shear_of(image.affine) < SHEAR:
        return image
    spacing = spacing_of(image.affine)
    axes = image.affine[:3, :3] / spacing
    # The plane of the first two axes stays, as does the distance between slices.
    first = axes[:, 0]
    second = axes[:, 1] - (axes[:, 1] @ first) * first
    second /= np.linalg.norm(second)
    third = np.cross(first, second)
    grid = np.stack([first * spacing[0], second * spacing[1], third * (spacing[2] * abs(third @ axes[:, 2]))], axis=1)
    corners = np.array(np.meshgrid(*[(0, extent - 1) for extent in image.spatial_shape], indexing="ij")).reshape(3, -1)
    places = np.linalg.solve(grid, image.affine[:3, :3] @ corners)  # (3, 8) in voxels of the new grid
    start = np.floor(places.min(axis=1) + 1e-3)
    shape = np.ceil(places.max(axis=1) - 1e-3) - start + 1
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = grid, image.affine[:3, 3] + grid @ start
    steps.append("sheared slices resampled to a straight grid")
    return tio.Resample((tuple(int(n) for n in shape), affine), image_interpolation=recipe.interpolation)(image)


def _reorient(image: tio.ScalarImage, recipe: Recipe, steps: list[str]) -> tio.ScalarImage:
    orientation = "".join(image.orientation)
    if orientation != "RAS":
        steps.append(f"reoriented {orientation} to RAS")
    return tio.ToCanonical()(image)


def _resample(image: tio.ScalarImage, recipe: Recipe, steps: list[str]) -> tio.ScalarImage:
    spacing, wanted = spacing_of(image.affine), recipe.spacing_mm
    if wanted is None or np.allclose(spacing, wanted, rtol=SAME_SPACING, atol=0):
        return image
    sizes = np.array(image.spatial_shape) * spacing
    if np.any(sizes < wanted):
        raise UserError(f"{mm_text(sizes)} large as a whole: too small for voxels of {mm_text(wanted)}")
    steps.append(f"resampled from {mm_text(spacing)} to {mm_text(wanted)} ({recipe.interpolation})")
    return tio.Resample(tuple(wanted), image_interpolation=recipe.interpolation, antialias=True)(image)


def _crop_or_pad(image: tio.ScalarImage, recipe: Recipe, steps: list[str]) -> tuple[tio.ScalarImage, float]:
    """Crops around the middle of the foreground, pads on both sides. Also gives the share of foreground cut off."""
    shape = np.array(image.spatial_shape)
    size = np.array(recipe.size or -(-shape // recipe.multiple) * recipe.multiple)
    lost = 0.0
    if np.any(shape > size):
        mask, stride = coarse_foreground(image.numpy()[0])
        places = np.argwhere(mask) * stride
        middle = (places.min(axis=0) + places.max(axis=0) + stride) / 2
        kept = np.minimum(shape, size)
        start = np.clip(np.round(middle - kept / 2), 0, shape - kept).astype(int)
        ends = start // stride - (-kept // stride)
        inside = mask[tuple(map(slice, start // stride, ends))].sum()
        lost = float(1 - inside / mask.sum())
        steps.append(f"cropped from {size_text(shape)} to {size_text(kept)} at {size_text(start)}")
        image = tio.Crop(_both_sides(start, shape - kept - start))(image)
        shape = kept
    if np.any(shape < size):
        before = (size - shape) // 2
        steps.append(f"padded from {size_text(shape)} to {size_text(size)}")
        image = tio.Pad(_both_sides(before, size - shape - before), padding_mode=0)(image)
    return image, lost


def coarse_foreground(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask of the largest object in a volume (X, Y, Z), by Otsu's threshold, on every n-th voxel along each axis.

    Returns the mask and n, (3,). The mask is true somewhere.
    """
    sample, stride = coarse(data)
    bright = sitk.OtsuThreshold(sitk.GetImageFromArray(sample), 0, 1)
    objects = sitk.RelabelComponent(sitk.ConnectedComponent(bright), sortByObjectSize=True)
    mask = sitk.GetArrayFromImage(objects) == 1
    return (mask, stride) if mask.any() else (np.ones_like(mask), stride)


def _both_sides(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """(x before, x after, y before, ...), as TorchIO takes it."""
    return tuple(int(amount) for pair in zip(before, after, strict=True) for amount in pair)
