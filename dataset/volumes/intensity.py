"""Intensity ranges: the model's is [-1, 1], with the background at -1. The only place that converts ranges."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError

MODEL_RANGE = (-1.0, 1.0)
BACKGROUND = MODEL_RANGE[0]
BACKGROUND_TOLERANCE = 2e-3  # voxels up to this above the background are background too
RANGE_TOLERANCE = 1e-3  # share of the declared range by which a voxel may lie outside it (rounding, interpolation)
RESCALING = (
    "if all files have this scale, declare it (dataset.intensity_range=[{found_low:g},{found_high:g}] in training, "
    "--intensity-range {found_low:g} {found_high:g} for latents); "
    "otherwise rescale the file to [{low:g}, {high:g}], or prepare it with dataset/preprocess.py"
)


def check_intensity_range(intensity_range: Sequence[float]) -> tuple[float, float]:
    """The range as two floats. UserError unless it is two finite numbers, the lower one first."""
    values = tuple(float(value) for value in intensity_range)
    if len(values) != 2 or not np.all(np.isfinite(values)) or values[0] >= values[1]:
        raise UserError(
            f"dataset.intensity_range is {list(values)}: give the lowest and the highest intensity of the files, "
            "lower one first, e.g. dataset.intensity_range=[-1,1]"
        )
    return values


def to_model_range(
    data: torch.Tensor, intensity_range: Sequence[float], path: str | Path, advice: str = RESCALING
) -> torch.Tensor:
    """Maps `intensity_range` linearly to [-1, 1].

    Values that lie outside by no more than 0.1 % of the range are clamped; anything further out is a UserError that
    names the file, because the scale of such a file is unknown, and ends with the `advice`.
    """
    low, high = check_intensity_range(intensity_range)
    found_low, found_high = float(data.min()), float(data.max())
    tolerance = RANGE_TOLERANCE * (high - low)
    if found_low < low - tolerance or found_high > high + tolerance:
        raise UserError(
            f"{path}: intensities from {found_low:g} to {found_high:g} lie outside the declared range "
            f"[{low:g}, {high:g}]: {advice.format(found_low=found_low, found_high=found_high, low=low, high=high)}"
        )
    if (low, high) != MODEL_RANGE:
        data = (data - low) * ((MODEL_RANGE[1] - MODEL_RANGE[0]) / (high - low)) + MODEL_RANGE[0]
    return data.clamp(*MODEL_RANGE)


def from_model_range(data: torch.Tensor, intensity_range: Sequence[float]) -> torch.Tensor:
    """Maps [-1, 1] linearly to `intensity_range`, the inverse of `to_model_range`."""
    low, high = check_intensity_range(intensity_range)
    return (data - MODEL_RANGE[0]) * ((high - low) / (MODEL_RANGE[1] - MODEL_RANGE[0])) + low


def foreground(data: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """Mask of the voxels of a volume in the model's range that are not background."""
    return data > BACKGROUND + BACKGROUND_TOLERANCE


def is_empty(data: torch.Tensor) -> bool:
    """Whether a volume in the model's range shows nothing: all background, or one value everywhere."""
    low, high = float(data.min()), float(data.max())
    return high - low <= BACKGROUND_TOLERANCE or high <= BACKGROUND + BACKGROUND_TOLERANCE
