"""What dataset/phantoms.py makes: the anatomy of a chest and a head, and data sets of them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from common.errors import UserError
from common.files import write_atomically
from common.parallel import map_in_processes
from common.places import exists
from dataset.order.data_split import HELD_OUT, TRAINING, VALIDATION, Shares
from dataset.order.draw_split import given_split
from dataset.preparation.classes import AUTOENCODER_JSON, add_classes
from dataset.volumes.geometry import affine_from_spacing
from dataset.volumes.index import LATENT_SUFFIX, VOLUME_SUFFIX, size_folder
from dataset.volumes.intensity import BACKGROUND
from dataset.volumes.volume_io import is_whole_volume, write_nifti

TEXTURE = 0.02  # standard deviation of the texture: 1 % of the intensity range
LEVELS = 1024  # intensities are multiples of 1/1024, which halves the size of the compressed files
# Index of the first phantom of each side, never reached by those of another, and what its files are called.
SIDE_STARTS = {TRAINING: (0, ""), HELD_OUT: (1_000_000, "held_out_"), VALIDATION: (2_000_000, "validation_")}
SLAB_START = 500_000  # added for slabs, which are other chests than the whole ones
MIN_SIZE = 16
VERSION = 2  # rises when the same arguments give other phantoms


@dataclass(frozen=True)
class Phantom:
    """data: (X, Y, Z) float32 in [-1, 1], background exactly -1; x right, y to the front, z to the head (RAS)."""

    data: np.ndarray
    spacing_mm: tuple[float, float, float]


class Canvas:
    """A volume that shapes are painted on one after the other, in coordinates from -1 to 1 along each axis.

    The coordinates are bent by a smooth random displacement, so that no two phantoms have the same outlines.
    """

    def __init__(self, size: int, rng: np.random.Generator, displacement: float):
        self.size = size
        self.rng = rng
        self.data = np.full((size,) * 3, BACKGROUND, dtype=np.float32)
        line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
        grid = np.meshgrid(line, line, line, indexing="ij", sparse=True)
        self.x, self.y, self.z = (axis + displacement * self.smooth_noise(3) for axis in grid)

    def smooth_noise(self, cells: int) -> np.ndarray:
        """A random field of standard deviation about 1 that varies over 1/cells of the volume, (X, Y, Z)."""
        coarse = self.rng.standard_normal((cells + 1,) * 3).astype(np.float32)
        return 1.6 * ndimage.zoom(coarse, self.size / (cells + 1), order=2, mode="mirror", grid_mode=True)

    def soft(self, distance: np.ndarray) -> np.ndarray:
        """0 ... 1 for a distance in coordinates, positive inside: an edge about one and a half voxels wide."""
        return np.clip(distance * (self.size / 3) + 0.5, 0, 1)

    def ellipsoid(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        """Signed distance (approximate, positive inside) to an ellipsoid."""
        squares = sum(((axis - c) / r) ** 2 for axis, c, r in zip((self.x, self.y, self.z), centre, radii, strict=True))
        return (1 - np.sqrt(squares)) * min(radii)

    def paint(self, mask: np.ndarray, value: float | np.ndarray) -> None:
        """Lays `value` over the canvas where `mask` (0 ... 1) is 1."""
        self.data += mask * (value - self.data)

    def finish(self, body: np.ndarray, shading: float, blur: float) -> np.ndarray:
        """Adds the scanner: its point spread (standard deviation `blur`, in voxels), shading (relative) and texture.

        Everything outside the body becomes background.
        """
        grain = ndimage.gaussian_filter(self.rng.standard_normal(self.data.shape).astype(np.float32), 0.6)
        blurred = ndimage.gaussian_filter(self.data, blur, mode="nearest")
        brightness = (blurred - BACKGROUND) * (1 + shading * self.smooth_noise(2))
        data = BACKGROUND + brightness + TEXTURE / grain.std() * grain
        data = BACKGROUND + body * (data - BACKGROUND)
        return np.clip(np.round(data * LEVELS) / LEVELS, -1, 1).astype(np.float32)


def make_phantom(class_id: int, index: int, size: int = 64, seed: int = 0) -> Phantom:
    """The phantom number `index` of a class: the same for the same arguments, and size³ voxels large."""
    if size < MIN_SIZE:
        raise UserError(f"--size {size}: phantoms of at least {MIN_SIZE} voxels are needed to hold their anatomy")
    return CLASSES[class_id][1](size, np.random.default_rng([seed, class_id, index]))


def chest_phantom(size: int, rng: np.random.Generator) -> Phantom:
    """A thorax: fat and muscle around two lungs with vessels, heart, aorta, spine, ribs, diaphragm and liver."""
    canvas = Canvas(size, rng, displacement=0.02)
    x, y, z = canvas.x, canvas.y, canvas.z
    width, depth = rng.uniform(0.86, 0.95), rng.uniform(0.60, 0.72)
    fat, muscle, lung, bone, blood = (rng.normal(value, 0.04) for value in (-0.22, 0.14, -0.80, 0.72, 0.30))

    body = canvas.ellipsoid((0, 0, 0), (width, depth, 40.0))
    canvas.paint(canvas.soft(body), fat)
    wall = body - rng.uniform(0.05, 0.10)  # distance to the inner side of the fat
    canvas.paint(canvas.soft(wall), muscle)

    # Lungs: two ellipsoids within the chest wall, cut off by the two domes of the diaphragm.
    cavity = wall - rng.uniform(0.08, 0.11)
    floor = rng.uniform(-0.75, -0.45)
    lungs = []
    for side in (-1, 1):
        outline = canvas.ellipsoid((0.43 * side, 0.0, -0.1), (0.37, 0.62, rng.uniform(1.05, 1.25)))
        dome = z - floor - 0.08 * side + 1.1 * ((x - 0.45 * side) ** 2 + y**2)
        lungs.append(np.minimum(np.minimum(outline, cavity), dome))
    heart = canvas.ellipsoid((-0.14, 0.14, -0.22), tuple(rng.uniform((0.27, 0.22, 0.32), (0.35, 0.28, 0.42))))
    for side, outline in zip((-1, 1), lungs, strict=True):
        inside = canvas.soft(np.minimum(outline, -heart))
        canvas.paint(inside, lung)
        canvas.paint(inside * vessel_tree(canvas, side), blood - 0.1)
    canvas.paint(canvas.soft(np.minimum(wall, floor - 0.05 - z)) * canvas.soft(x - 0.05), muscle + 0.14)  # liver

    canvas.paint(canvas.soft(heart), blood)
    back = -depth + rng.uniform(0.26, 0.32)  # y of the vertebral bodies
    canvas.paint(canvas.soft(0.075 - np.hypot(x + 0.15, y - back - 0.16)), blood)  # descending aorta
    canvas.paint(canvas.soft(np.minimum(0.055 - np.hypot(x - 0.02, y - 0.02), z - 0.1)), lung - 0.1)  # trachea
    paint_skeleton(canvas, cavity, back, depth, bone)

    data = canvas.finish(canvas.soft(body), shading=0.01, blur=0.6)
    return Phantom(data, field_of_view(rng, size, (370, 370, 330)))


def vessel_tree(canvas: Canvas, side: int) -> np.ndarray:
    """Vessels (0 ... 1) that branch from the hilum of a lung, thinner towards the chest wall."""
    rng, size = canvas.rng, canvas.size
    drops = np.zeros((size,) * 3, dtype=np.float32)
    hilum = np.array([0.16 * side, 0.0, rng.uniform(-0.05, 0.1)])
    for _ in range(14):
        end = np.array([0.45 * side, 0, 0]) + rng.uniform((-0.2, -0.4, -0.7), (0.25, 0.4, 0.75))
        bend = (hilum + end) / 2 + rng.normal(0, 0.08, 3)
        t = np.linspace(0, 1, 3 * size)[:, None]
        curve = (1 - t) ** 2 * hilum + 2 * t * (1 - t) * bend + t**2 * end
        voxels = np.clip(((curve + 1) * size / 2).astype(int), 0, size - 1)
        np.maximum.at(drops, tuple(voxels.T), (1.6 - t[:, 0]).astype(np.float32))
    return np.clip(3.2 * ndimage.gaussian_filter(drops, 0.014 * size), 0, 1)


def paint_skeleton(canvas: Canvas, cavity: np.ndarray, back: float, depth: float, bone: float) -> None:
    """Vertebrae with discs between them, the spinal canal, ribs that run down to the front, and the sternum."""
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    pitch, phase = rng.uniform(16, 20), rng.uniform(0, 2 * np.pi)  # radians a unit of z: about five to seven vertebrae
    vertebra = 0.5 + 0.5 * np.clip(3 * np.sin(pitch * z + phase) + 1.5, -1, 1)
    canvas.paint(canvas.soft(1 - np.hypot(x / 0.15, (y - back) / 0.13)) * canvas.soft(0.13), bone)
    canvas.paint(canvas.soft((1 - np.hypot(x / 0.13, (y - back) / 0.11)) * 0.1) * (1 - vertebra), 0.15)  # discs
    canvas.paint(canvas.soft(0.1 - abs(x)) * canvas.soft(0.08 - abs(y - back + 0.16)), bone - 0.1)  # arches
    canvas.paint(canvas.soft(0.055 - np.hypot(x, y - back + 0.16)), 0.0)  # canal
    wall = canvas.soft(0.032 - abs(cavity + 0.045))  # a shell just outside the cavity
    rib = canvas.soft(0.25 * (np.sin(pitch * (z + 0.35 * y) + phase) - 0.1))
    canvas.paint(wall * rib, bone)
    canvas.paint(canvas.soft(0.11 - abs(x)) * canvas.soft(0.045 - abs(y - depth + 0.2)) * canvas.soft(z + 0.4), bone)


def brain_phantom(size: int, rng: np.random.Generator) -> Phantom:
    """A head: scalp, skull, fluid, folded grey and white matter with the fissure between the halves, ventricles,
    deep nuclei, cerebellum and stem."""
    canvas = Canvas(size, rng, displacement=0.015)
    x, y, z = canvas.x, canvas.y, canvas.z
    radii = tuple(rng.uniform((0.70, 0.84, 0.78), (0.78, 0.94, 0.88)))
    scalp, skull, fluid, grey, white = (rng.normal(value, 0.04) for value in (0.55, -0.78, -0.55, -0.06, 0.42))

    head = canvas.ellipsoid((0, 0, 0.03), radii)
    neck = np.minimum(0.42 - np.hypot(x, y + 0.12), 0.1 - z)
    outline = np.maximum(head, neck)
    canvas.paint(canvas.soft(outline), scalp)
    inner = outline - rng.uniform(0.07, 0.09)
    canvas.paint(canvas.soft(np.minimum(inner, z + 0.75)), skull)
    canvas.paint(canvas.soft(np.minimum(neck - 0.08, -0.45 - z)), grey - 0.2)  # muscles of the neck

    # The brain: a surface folded by a random field, grey on the outside and white from some depth on.
    cavity = np.minimum(head - rng.uniform(0.15, 0.175), z + 0.62)
    canvas.paint(canvas.soft(cavity), fluid)
    ridges = np.exp(-((canvas.smooth_noise(10) / 0.42) ** 2))  # 1 along the furrows
    cerebrum = np.minimum(cavity - 0.02, z + 0.32 + 0.25 * y)
    cerebrum = np.minimum(cerebrum, abs(x) - 0.012 + 0.6 * np.maximum(0.2 - z, 0))  # fissure between the halves
    cortex = cerebrum - rng.uniform(0.09, 0.12) * ridges * np.clip(1.1 - cerebrum / 0.22, 0, 1)
    canvas.paint(canvas.soft(cortex), grey)
    depth = cortex - rng.uniform(0.075, 0.10) - 0.05 * ridges
    canvas.paint(canvas.soft(depth), white)
    paint_deep_structures(canvas, grey, white, fluid)

    data = canvas.finish(canvas.soft(outline), shading=0.03, blur=0.7)
    return Phantom(data, field_of_view(rng, size, (215, 215, 215)))


def paint_deep_structures(canvas: Canvas, grey: float, white: float, fluid: float) -> None:
    """Nuclei, ventricles, cerebellum and brain stem."""
    rng, (x, y, z) = canvas.rng, (canvas.x, canvas.y, canvas.z)
    stem = canvas.ellipsoid((0, -0.12, -0.45), (0.11, 0.12, 0.42))
    canvas.paint(canvas.soft(stem), white - 0.08)
    cerebellum = canvas.ellipsoid((0, -0.42, -0.36), tuple(rng.uniform((0.36, 0.22, 0.17), (0.44, 0.27, 0.21))))
    leaves = 0.5 + 0.5 * np.sin(34 * (z + 0.5 * np.hypot(x, y + 0.2)))
    canvas.paint(canvas.soft(cerebellum), grey + 0.25 * (white - grey) * leaves)
    width, length = rng.uniform(0.045, 0.10), rng.uniform(0.28, 0.42)
    for side in (-1, 1):
        canvas.paint(canvas.soft(canvas.ellipsoid((0.16 * side, -0.03, 0.02), (0.10, 0.17, 0.11))), grey + 0.08)
        bent = x - side * (0.05 + 0.35 * (y - 0.02) ** 2 + 0.25 * width)  # the horns diverge to front and back
        squares = (bent / width) ** 2 + ((y - 0.02) / length) ** 2 + ((z - 0.14) / 0.13) ** 2
        canvas.paint(canvas.soft((1 - np.sqrt(squares)) * width), fluid)


def field_of_view(rng: np.random.Generator, size: int, lengths_mm: tuple[int, int, int]) -> tuple[float, float, float]:
    """The spacing of a volume about `lengths_mm` long: in-plane the same, along z of its own, to 0.01 mm."""
    in_plane, along_z = rng.normal(1, 0.05, 2).clip(0.85, 1.15)
    scale = (in_plane, in_plane, along_z)
    return tuple(round(float(length * factor / size), 2) for length, factor in zip(lengths_mm, scale, strict=True))


CLASSES = (("CTChest", chest_phantom), ("MRBrain", brain_phantom))
CHEST = 0


def slab(phantom: Phantom) -> Phantom:
    """The middle of a phantom, half as high."""
    depth = phantom.data.shape[2]
    return Phantom(phantom.data[..., depth // 4 : depth // 4 + depth // 2], phantom.spacing_mm)


def only_training(count: int) -> dict[str, int]:
    """Counts for `write_phantoms`."""
    return {TRAINING: count, VALIDATION: 0, HELD_OUT: 0}


def write_phantoms(
    output_dir: Path,
    counts: Mapping[str, int],
    size: int,
    seed: int,
    slabs: float = 0.0,
    num_workers: int = 0,
    show: bool = False,
) -> None:
    """Writes the phantoms, their JSONs and the split; files that are there already and whole are left alone.

    counts: side of the split -> phantoms of each class. slabs: as a share of these, chests of half the height, whose
    folder then lies beside that of the whole ones. num_workers, show: as of `map_in_processes`.

    UserError if `output_dir` holds phantoms of another size, seed or share, or more of them than asked for.
    """
    check_record(output_dir, {"size": size, "seed": seed, "version": VERSION} | ({"slabs": slabs} if slabs else {}))
    places = [(name, class_id, 1.0, 0) for class_id, (name, _) in enumerate(CLASSES)]  # ..., share, first index
    if slabs:
        chest, _ = CLASSES[CHEST]
        whole, half = (f"{chest}/{size_folder((size, size, depth))}" for depth in (size, size // 2))
        places[CHEST] = (whole, CHEST, 1.0, 0)
        places.append((half, CHEST, slabs, SLAB_START))
    jobs, sides = [], {}
    for side, count in counts.items():
        start, word = SIDE_STARTS[side]
        for place, class_id, share, first in places:
            prefix = f"{CLASSES[class_id][0]}_{'half_' if first else ''}{word}"
            for i in range(round(share * count)):
                path = output_dir / place / f"{prefix}{i:04d}{VOLUME_SUFFIX}"
                jobs.append((path, class_id, start + first + i, first > 0))
                sides[path] = side
    check_no_others(output_dir, {path for path, *_ in jobs})

    def make(job: tuple[Path, int, int, bool]) -> None:
        path, class_id, index, is_slab = job
        if not is_whole_volume(path):
            phantom = make_phantom(class_id, index, size, seed)
            phantom = slab(phantom) if is_slab else phantom
            write_nifti(path, phantom.data, affine_from_spacing(phantom.spacing_mm))

    for _ in map_in_processes(make, jobs, num_workers, "making", "phantom", show):
        pass
    for place, class_id, _, _ in places:
        add_classes(output_dir, {class_id: place})
    total = sum(counts.values())
    shares = Shares(None, counts[VALIDATION] / total, counts[HELD_OUT] / total, seed)
    given_split(output_dir / AUTOENCODER_JSON, shares, sides).write(output_dir)


def check_record(output_dir: Path, options: dict[str, int]) -> None:
    """Compares the options with those that the folder's phantoms were made with, and notes them in a new folder."""
    record = output_dir / "phantoms.json"
    if not exists(record):
        write_atomically(record, (json.dumps(options) + "\n").encode())
    elif (found := record.read_text().strip()) != json.dumps(options):
        raise UserError(f"{output_dir}: holds phantoms made with {found}, not {json.dumps(options)}: name a new folder")


def check_no_others(output_dir: Path, expected: set[Path]) -> None:
    """Files beyond those asked for would be trained on or measured as well."""
    others = sorted(set(output_dir.rglob(f"*{VOLUME_SUFFIX}")) - expected)
    if others := [path for path in others if not path.parent.name.endswith(LATENT_SUFFIX)]:
        raise UserError(f"{output_dir}: {len(others)} files more than asked for, e.g. {others[0]}: name a new folder")
