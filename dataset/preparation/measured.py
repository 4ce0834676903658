"""What the voxels of a scan are, judged by their values: an image at all, padding, Hounsfield units."""

import math
from collections.abc import Sequence

import numpy as np

from common.errors import UserError

COARSE_EDGE = 128  # voxels per axis that are looked at
# Label maps and masks
LEAST_LABEL = -1  # images with negative values are measured ones
FEW_VALUES = 20  # no image has so few
MANY_VALUES = 1024  # more labels are not known
EVEN_SHARE = 0.7  # of the voxels of a label map that are as their neighbour, at least; noise alone makes that rare
# Padding: a value that scanners and programs put where nothing was measured
HIGHEST_PADDING = -1100  # HU of air go down to about that
PADDING_SHARE = 1e-3
PADDING_GAP = 50  # measured values spread, so that many lie this close to a common one
MOST_PADDING = 3  # values; more are a coarse scale
# Hounsfield units: air has -1000, water 0
LARGEST_HU = 32_767  # beyond any metal; more are signed voxels that were stored as unsigned
LEAST_PADDING = -4200  # 12 bits below 0; lossy compression spreads padding, which then is no constant any more
LOW_HU, HIGH_HU = -1500, 2500  # beyond them lie overshoot and metal
FEW, MANY = 0.01, 0.05  # shares of such voxels
LOW_PERCENTILE = 0.1  # a few odd voxels don't decide
AIR, AIR_SHARE = -500, 5e-3  # air and lung lie below; a share from which on there is some
SOFT, SOFT_SHARE, LEAST_SOFT = 250, 0.1, 2e-3  # |HU| of fat, water and soft tissue; of all that is no air, and of all


class NotAVolume(UserError):
    """Images that nobody takes for a training volume: localisers, masks, screenshots. They are left out, no fault."""


def coarse(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th voxel along each axis, so that none has more than COARSE_EDGE; and n, (3,)."""
    stride = np.array([math.ceil(extent / COARSE_EDGE) for extent in data.shape])
    return np.ascontiguousarray(data[tuple(slice(None, None, step) for step in stride)]), stride


def check_is_image(data: np.ndarray) -> None:
    """NotAVolume: a label map or mask (X, Y, Z), known by few distinct values, or whole ones that come in patches."""
    if data.min() < LEAST_LABEL:
        return
    values, counts = np.unique(coarse(data)[0], return_counts=True)
    if len(values) == 1:  # perhaps the background of a small mask
        values = np.unique(data)
    if len(values) == 1 or len(values) > MANY_VALUES:
        return
    is_whole = bool(np.all(values == np.rint(values)))
    if len(values) <= FEW_VALUES or (is_whole and _even_share(data, values[counts.argmax()]) >= EVEN_SHARE):
        whole = " whole" if is_whole else ""
        raise NotAVolume(f"{len(np.unique(data))} distinct{whole} values: a label map or mask, not an image")


def _even_share(data: np.ndarray, background: float) -> float:
    """The share of voxels other than the background that are as their neighbour, mean over the three axes.

    One axis alone would not do: an image may be made of copied slices, those of a label map may lie far apart.
    """
    shares = []
    for axis in range(3):
        turned = np.moveaxis(data, axis, 0)
        voxels, neighbours = coarse(turned[:-1])[0], coarse(turned[1:])[0]
        is_inside = voxels != background
        shares.append(np.mean(voxels[is_inside] == neighbours[is_inside]) if is_inside.any() else 0.0)
    return float(np.mean(shares))


def find_padding(data: np.ndarray) -> tuple[float, ...]:
    """The values of a volume (X, Y, Z) that are padding: low, each shared by many voxels, clear of everything else."""
    sample = coarse(data)[0]
    values, counts = np.unique(sample[sample < HIGHEST_PADDING], return_counts=True)
    padding = [
        float(value)
        for value, count in zip(values, counts, strict=True)
        if count >= PADDING_SHARE * sample.size and np.count_nonzero(np.abs(sample - value) < PADDING_GAP) < 1.1 * count
    ]
    is_all = np.isin(sample, padding).all()
    return () if is_all or len(padding) > MOST_PADDING else tuple(padding)


def measured_values(data: np.ndarray, padding: Sequence[float]) -> np.ndarray:
    """The voxels that are not padding, in no order."""
    return data[~np.isin(data, padding)] if len(padding) else data.reshape(-1)


def check_hounsfield(voxels: np.ndarray, highest: float) -> None:
    """UserError: values that can't be Hounsfield units.

    voxels: those of a scan without padding, or some of them, (N,). highest: the highest of all, the one that alone is
    enough where it is beyond all that HU can be.
    """

    def share(low: float, high: float) -> float:
        return float(np.mean((voxels >= low) & (voxels <= high)))

    if highest > LARGEST_HU:
        raise UserError(
            f"values up to {highest:g} are no Hounsfield units: negative values were stored as unsigned numbers; "
            "export the series again or correct its pixel representation"
        )
    low, high, soft = share(-np.inf, LOW_HU), share(HIGH_HU, np.inf), share(-SOFT, SOFT)
    is_scaled = share(-np.inf, LEAST_PADDING) > FEW or share(4000, np.inf) > MANY
    # Many low ones are padding only where the others are air, soft tissue and little else.
    is_scaled |= low > FEW and (share(-1150, -850) < FEW or soft < SOFT_SHARE * (1 - low) or high > MANY)
    if is_scaled:
        what = f"{low:.0%} of the voxels lie below {LOW_HU} and {high:.0%} above {HIGH_HU}"
        raise UserError(
            f"{what}: they are no Hounsfield units, air has -1000 and bone up to 2000: another slope (rescale slope) "
            "or an offset taken off twice; export the series again, or give percentiles in place of a window"
        )
    lowest = float(np.percentile(voxels, LOW_PERCENTILE))
    found = f"values from {lowest:g} to {highest:g} are no Hounsfield units"
    # With the scanner's offset left in, soft tissue lies near 1000, where HU have nothing but the densest bone.
    dense = share(800, 1200)
    peak = max(share(low, low + 150) for low in range(850, 1001, 50))
    is_offset = share(-np.inf, AIR) < AIR_SHARE and (3 * dense > soft or peak > 0.35 * share(SOFT, np.inf) > 0.005)
    if lowest >= 0 or is_offset:
        raise UserError(
            f"{found}, air has -1000: the offset of the scanner (rescale intercept, mostly -1024) is missing; add it, "
            "or give percentiles in place of a window"
        )
    if soft < max(SOFT_SHARE * share(AIR, np.inf), LEAST_SOFT):
        raise UserError(
            f"{found}: only {soft:.1%} lie near 0, where fat, water and soft tissue are; export the series again, or "
            "give percentiles in place of a window"
        )
