"""Measurement operators: what is measured of a volume, what is reconstructed of that alone, and what agrees with it.

Volumes are arrays (X, Y, Z) float32 in [-1, 1], axes right, front, head; slices lie along Z.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import ndimage

Measured = Mapping[str, np.ndarray]
Spacing = tuple[float, float, float]

MU_WATER = 0.0192  # 1/mm, at about 70 keV
SART_RELAXATION = 0.15
CENTRE_SHARE = 0.04  # of the k-space lines around zero frequency, which are always measured
GAUSSIAN_WIDTH = 1 / 6  # standard deviation of the drawn lines' distance from the centre, as a share of all


class Operator(Protocol):
    """A dataclass of parameters, with these methods."""

    def measure(self, volume: np.ndarray, spacing_mm: Spacing, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What is measured of a volume."""

    def reconstruct(self, measured: Measured) -> np.ndarray:
        """The condition: a volume from what was measured alone."""

    def agreeing(self, volume: np.ndarray, measured: Measured) -> np.ndarray:
        """A volume near this one that agrees with what was measured."""

    def residual(self, volume: np.ndarray, measured: Measured) -> float:
        """How far a volume is from what was measured, in the norm of that."""


@dataclass(frozen=True)
class SparseViewCT:
    """Parallel beams around Z, by scikit-image: `views` evenly spaced over `arc` degrees.

    photons: expected on a detector without a patient; 0: no noise. window: HU of -1 and 1. sweeps: of SART (Andersen &
    Kak 1984) that bring a volume to the sinogram.
    """

    views: int = 16
    arc: float = 180.0
    photons: float = 0.0
    window: tuple[float, float] = (-1000.0, 1000.0)
    sweeps: int = 6

    def measure(self, volume: np.ndarray, spacing_mm: Spacing, rng: np.random.Generator) -> dict[str, np.ndarray]:
        in_plane = float(np.mean(spacing_mm[:2]))
        paths = self._project(self._attenuation(volume)) * in_plane  # (detectors, views, Z), without unit
        if self.photons:
            counts = rng.poisson(self.photons * np.exp(-paths))
            paths = -np.log(np.maximum(counts, 1) / self.photons)
        return {
            "sinogram": (paths / in_plane).astype(np.float32),
            "size": np.array(volume.shape),
            "in_plane_mm": np.array(in_plane),
        }

    def reconstruct(self, measured: Measured) -> np.ndarray:
        from skimage.transform import iradon

        sinogram, size = measured["sinogram"], measured["size"]
        edge = max(size[:2])
        slices = [
            iradon(sinogram[:, :, z], self._angles, output_size=int(edge), circle=False) for z in range(int(size[2]))
        ]
        return self._intensities(_cropped(np.stack(slices, axis=-1), size))

    def agreeing(self, volume: np.ndarray, measured: Measured) -> np.ndarray:
        from skimage.transform import iradon_sart

        sinogram = measured["sinogram"].astype(np.float64)
        image = _padded(self._attenuation(volume), len(sinogram)).astype(np.float64)
        for z in range(image.shape[2]):
            found = image[:, :, z]
            for _ in range(self.sweeps):
                found = iradon_sart(
                    sinogram[:, :, z], self._angles, image=found, clip=(0, np.inf), relaxation=SART_RELAXATION
                )
            image[:, :, z] = found
        return self._intensities(_cropped(image, volume.shape))

    def residual(self, volume: np.ndarray, measured: Measured) -> float:
        return _relative(self._project(self._attenuation(volume)), measured["sinogram"])

    @property
    def _angles(self) -> np.ndarray:
        return np.arange(self.views) * (self.arc / self.views)

    def _project(self, attenuation: np.ndarray) -> np.ndarray:
        """Sums along rays, in voxels, (detectors, views, Z)."""
        from skimage.transform import radon

        square = _padded(attenuation, max(attenuation.shape[:2]))
        slices = [radon(square[:, :, z], self._angles, circle=False) for z in range(square.shape[2])]
        return np.stack(slices, axis=-1)

    def _attenuation(self, volume: np.ndarray) -> np.ndarray:
        """1/mm of intensities."""
        low, high = self.window
        hounsfield = (volume + 1) / 2 * (high - low) + low
        return np.maximum(hounsfield / 1000 + 1, 0) * MU_WATER

    def _intensities(self, attenuation: np.ndarray) -> np.ndarray:
        low, high = self.window
        hounsfield = (attenuation / MU_WATER - 1) * 1000
        return np.clip((hounsfield - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)


@dataclass(frozen=True)
class FastMRI:
    """Undersampled k-space of axial slices: a single coil, images from 0 to 1 without phase.

    acceleration: one of how many lines, or points, is measured. mask: "gaussian" and "equispaced" lines along Y, or
    "poisson", points of a disc of which no two are near each other, the fewer the higher the frequency. noise: standard
    deviation of k-space's real and imaginary part (orthonormal transform).
    """

    acceleration: float = 6.0
    mask: str = "gaussian"
    noise: float = 0.0

    def measure(self, volume: np.ndarray, spacing_mm: Spacing, rng: np.random.Generator) -> dict[str, np.ndarray]:
        kept = self._mask(volume.shape[:2], rng)  # (X, Y)
        values = _to_k_space((volume + 1) / 2)[kept]  # (N, Z)
        if self.noise:
            values = values + self.noise * (rng.standard_normal(values.shape) + 1j * rng.standard_normal(values.shape))
        return {"mask": kept, "values": values.astype(np.complex64)}

    def reconstruct(self, measured: Measured) -> np.ndarray:
        kept = measured["mask"]
        k_space = np.zeros((*kept.shape, measured["values"].shape[1]), dtype=np.complex64)
        k_space[kept] = measured["values"]
        return _from_k_space(np.abs(_of_k_space(k_space)))

    def agreeing(self, volume: np.ndarray, measured: Measured) -> np.ndarray:
        kept, known = measured["mask"], np.zeros(volume.shape, dtype=np.complex64)
        known[kept] = measured["values"]
        k_space, twins = _to_k_space((volume + 1) / 2), _mirrored(kept) & ~kept
        k_space[kept] = measured["values"]
        k_space[twins] = _mirrored(known).conj()[twins]  # of a real image
        return _from_k_space(_of_k_space(k_space).real)

    def residual(self, volume: np.ndarray, measured: Measured) -> float:
        return _relative(_to_k_space((volume + 1) / 2)[measured["mask"]], measured["values"])

    def _mask(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        if self.mask == "poisson":
            return _poisson_disc(shape, round(shape[0] * shape[1] / self.acceleration), rng)
        lines, centre = shape[1], shape[1] // 2
        wanted = max(1, round(lines / self.acceleration))
        distance = np.abs(np.arange(lines) - centre)
        kept = distance <= max(0.5, CENTRE_SHARE * lines / 2)
        if self.mask == "equispaced":
            others = np.flatnonzero(~kept)
            if (left := wanted - int(kept.sum())) > 0:
                apart = len(others) / left
                kept[others[(rng.uniform(0, apart) + apart * np.arange(left)).astype(int)]] = True
        elif (left := wanted - int(kept.sum())) > 0:
            chances = np.where(kept, 0, np.exp(-0.5 * (distance / (GAUSSIAN_WIDTH * lines)) ** 2))
            kept[rng.choice(lines, left, replace=False, p=chances / chances.sum())] = True
        return np.broadcast_to(np.fft.ifftshift(kept), shape).copy()


@dataclass(frozen=True)
class ThickSlices:
    """Slices `factor` times as thick along an axis (0, 1, 2 = X, Y, Z): means of as many voxels."""

    factor: int = 4
    axis: int = 2

    def measure(self, volume: np.ndarray, spacing_mm: Spacing, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"slices": self._means(volume), "size": np.array(volume.shape)}

    def reconstruct(self, measured: Measured) -> np.ndarray:
        slices, size = measured["slices"], measured["size"]
        zoom = [1.0] * 3
        zoom[self.axis] = self.factor
        smooth = ndimage.zoom(slices, zoom, order=1, mode="nearest", grid_mode=True)
        return np.take(smooth, np.arange(size[self.axis]), axis=self.axis).astype(np.float32)

    def agreeing(self, volume: np.ndarray, measured: Measured) -> np.ndarray:
        missing = np.repeat(measured["slices"] - self._means(volume), self.factor, axis=self.axis)
        missing = np.take(missing, np.arange(volume.shape[self.axis]), axis=self.axis)
        return np.clip(volume + missing, -1, 1).astype(np.float32)

    def residual(self, volume: np.ndarray, measured: Measured) -> float:
        return _relative(self._means(volume), measured["slices"])

    def _means(self, volume: np.ndarray) -> np.ndarray:
        """The last slice is that of the voxels that are left, repeated."""
        moved = np.moveaxis(volume, self.axis, 0)
        end = -len(moved) % self.factor
        moved = np.concatenate([moved, np.repeat(moved[-1:], end, axis=0)]) if end else moved
        means = moved.reshape(-1, self.factor, *moved.shape[1:]).mean(1)
        return np.moveaxis(means, 0, self.axis).astype(np.float32)


@dataclass(frozen=True)
class Inpainting:
    """A box of `size` (as shares of the volume's sides) is missing; where, is drawn."""

    size: float = 0.4

    def measure(self, volume: np.ndarray, spacing_mm: Spacing, rng: np.random.Generator) -> dict[str, np.ndarray]:
        sides = [max(1, round(self.size * extent)) for extent in volume.shape]
        first = [int(rng.integers(0, extent - side + 1)) for extent, side in zip(volume.shape, sides, strict=True)]
        known = np.ones(volume.shape, dtype=bool)
        known[tuple(slice(start, start + side) for start, side in zip(first, sides, strict=True))] = False
        return {"known": known, "values": volume[known]}

    def reconstruct(self, measured: Measured) -> np.ndarray:
        return self.agreeing(np.full(measured["known"].shape, -1, dtype=np.float32), measured)

    def agreeing(self, volume: np.ndarray, measured: Measured) -> np.ndarray:
        found = volume.copy()
        found[measured["known"]] = measured["values"]
        return found

    def residual(self, volume: np.ndarray, measured: Measured) -> float:
        return _relative(volume[measured["known"]], measured["values"])


OPERATORS = {"ct": SparseViewCT, "mri": FastMRI, "thick": ThickSlices, "inpaint": Inpainting}


def _relative(found: np.ndarray, measured: np.ndarray) -> float:
    return float(np.linalg.norm(found - measured) / max(np.linalg.norm(measured), 1e-12))


def _padded(volume: np.ndarray, edge: int) -> np.ndarray:
    """With zeros around X and Y, so that both have `edge` voxels."""
    width = [((edge - extent) // 2, edge - extent - (edge - extent) // 2) for extent in volume.shape[:2]]
    return np.pad(volume, [*width, (0, 0)])


def _cropped(volume: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The reverse of `_padded`."""
    first = [(have - int(extent)) // 2 for have, extent in zip(volume.shape[:2], size[:2], strict=True)]
    return volume[first[0] : first[0] + int(size[0]), first[1] : first[1] + int(size[1])]


def _to_k_space(image: np.ndarray) -> np.ndarray:
    return np.fft.fft2(image, axes=(0, 1), norm="ortho")


def _of_k_space(k_space: np.ndarray) -> np.ndarray:
    return np.fft.ifft2(k_space, axes=(0, 1), norm="ortho")


def _mirrored(k_space: np.ndarray) -> np.ndarray:
    """At each frequency the value of its negative."""
    return np.roll(np.flip(k_space, axis=(0, 1)), 1, axis=(0, 1))


def _from_k_space(image: np.ndarray) -> np.ndarray:
    """Intensities in [-1, 1] of an image from 0 to 1."""
    return np.clip(2 * image - 1, -1, 1).astype(np.float32)


def _poisson_disc(shape: tuple[int, int], wanted: int, rng: np.random.Generator) -> np.ndarray:
    """About `wanted` points, farther apart the farther they lie from the centre, zero frequency first."""
    x, y = np.meshgrid(*(np.fft.fftfreq(extent) * 2 for extent in shape), indexing="ij")  # -1 to 1
    radius = np.hypot(x, y)
    order = rng.permutation(x.size)
    centre = radius < CENTRE_SHARE
    low, high, kept = 0.0, 1.0, centre
    for _ in range(12):  # of the shortest distance in the middle
        nearest = (low + high) / 2
        kept = _thrown(np.fft.fftshift(radius), order, nearest, max(shape))
        kept = np.fft.ifftshift(kept) | centre
        low, high = (nearest, high) if kept.sum() > wanted else (low, nearest)
    return kept


def _thrown(radius: np.ndarray, order: np.ndarray, nearest: float, edge: int) -> np.ndarray:
    """Points in this order, each taken unless it lies in the disc of one that was; none beyond radius 1.

    A disc has `nearest` of a tenth of the edge in the middle, six times as much at radius 1.
    """
    free, kept = radius <= 1, np.zeros(radius.shape, dtype=bool)
    rows, columns = (np.arange(extent) for extent in radius.shape)
    reach = nearest * edge * (1 + 5 * radius) / 10
    for place in order:
        i, j = divmod(int(place), len(columns))
        if not free[i, j]:
            continue
        kept[i, j] = True
        size = int(reach[i, j])
        x, y = slice(max(0, i - size), i + size + 1), slice(max(0, j - size), j + size + 1)
        free[x, y] &= np.hypot(rows[x, None] - i, columns[y] - j) >= reach[i, j]
    return kept
