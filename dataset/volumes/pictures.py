"""Slices of volumes as a labelled grid in one PNG, drawn off screen.

Axes of a volume: D = z, H = x, W = y (see dataset/volumes/volume_io.py).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from common.text import printable

PLANES = ("axial", "coronal", "sagittal")


def central_slices(volume: Tensor, spacing_mm: Sequence[float] | None = None) -> dict[str, np.ndarray]:
    """The three slices through a volume's middle, as pictures: `{"axial", "coronal", "sagittal"}` in this order.

    volume: (D, H, W) or (1, D, H, W). Each picture is a float32 array (rows, columns), first row at the top:
    axial (W, H), y upwards and x to the right; coronal (D, H), z upwards and x to the right;
    sagittal (D, W), z upwards and y to the right. With `spacing_mm` (x, y, z) rows or columns are repeated where voxels
    are not cubes, so that the pictures have the right proportions.
    """
    if volume.ndim == 4 and volume.shape[0] == 1:
        volume = volume[0]
    if volume.ndim != 3 or volume.numel() == 0:
        raise UserError(f"a picture needs a volume (D, H, W) or (1, D, H, W), got shape {tuple(volume.shape)}")
    array = volume.detach().to("cpu", torch.float32).numpy()
    depth, height, width = array.shape
    slices = {
        "axial": array[depth // 2].T[::-1],  # (H, W) -> (W, H), rows from the top
        "coronal": array[:, :, width // 2][::-1],
        "sagittal": array[:, height // 2, :][::-1],
    }
    return slices if spacing_mm is None else with_square_pixels(slices, spacing_mm)


def with_square_pixels(slices: Mapping[str, np.ndarray], spacing_mm: Sequence[float]) -> dict[str, np.ndarray]:
    """What `central_slices` gives with this spacing (x, y, z) from what it gives without.

    The same where a header states no spacing that a voxel can have.
    """
    if not all(0 < length < math.inf for length in spacing_mm):
        return dict(slices)
    x, y, z = spacing_mm
    extents = {"axial": (y, x), "coronal": (z, x), "sagittal": (z, y)}
    return {plane: _square_pixels(slices[plane], *extents[plane]) for plane in PLANES}


def _square_pixels(picture: np.ndarray, row_mm: float, column_mm: float) -> np.ndarray:
    """The picture with its longer pixels repeated: the side along which they are shorter keeps its number of pixels."""
    for axis, length_mm in enumerate((row_mm, column_mm)):
        size = picture.shape[axis]
        count = max(1, round(size * length_mm / min(row_mm, column_mm)))
        picture = np.take(picture, (np.arange(count) * size) // count, axis=axis)
    return picture


def save_comparison(
    path: str | Path, rows: Sequence[tuple[str, Sequence[Tensor]]], *, planes: Sequence[str] = PLANES, title: str = ""
) -> np.ndarray:
    """One row per label, in it the central slices of every volume, as `save_slice_grid` draws them.

    rows: (label, volumes), each volume (D, H, W) or (1, D, H, W) in [-1, 1].
    planes: which to draw of each volume, in this order.
    """
    unknown = [plane for plane in planes if plane not in PLANES]
    if unknown or not planes:
        raise UserError(f"slices can be drawn in the planes {', '.join(PLANES)}, got {', '.join(planes) or 'none'}")
    cells = [(label, [central_slices(v)[plane] for v in volumes for plane in planes]) for label, volumes in rows]
    columns = list(planes) * max((len(volumes) for _, volumes in rows), default=0)
    return save_slice_grid(path, cells, columns=columns, title=title)


def save_slice_grid(
    path: str | Path,
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    columns: Sequence[str] = (),  # headings, first column first; fewer than the cells leaves the rest without
    title: str = "",
    value_range: tuple[float, float] = (-1.0, 1.0),  # intensities drawn black and white; beyond them is clipped
    cell_inches: float = 1.6,
) -> np.ndarray:
    """Draws rows of pictures with a label before each row, writes them as a PNG, and returns what was drawn.

    rows: (label, pictures), each picture an array (rows, columns) as `central_slices` gives; rows may differ in length.
    Returns uint8 (height, width, 3), the same picture for a logger. The file is written beside and renamed.
    """
    if not rows or not any(len(pictures) for _, pictures in rows):
        raise UserError(f"{path}: there are no slices to draw")
    num_columns = max(len(pictures) for _, pictures in rows)
    label_inches = 0.3 + 0.08 * max(len(line) for label, _ in rows for line in label.split("\n"))
    head_inches = 0.25 * bool(columns) + 0.35 * bool(title)
    width = label_inches + cell_inches * num_columns
    height = head_inches + cell_inches * len(rows)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)  # by hand, so that no global matplotlib state is touched
    if title:
        figure.text(0.5, 1 - 0.12 / height, title, ha="center", va="top", fontsize=10, parse_math=False)

    for i, (label, pictures) in enumerate(rows):
        bottom = height - head_inches - (i + 1) * cell_inches
        middle = (bottom + cell_inches / 2) / height
        figure.text(0.1 / width, middle, printable(label), ha="left", va="center", fontsize=9, parse_math=False)
        for j, picture in enumerate(pictures):
            left = label_inches + j * cell_inches
            box = (left / width, bottom / height, 0.96 * cell_inches / width, 0.96 * cell_inches / height)
            axes = figure.add_axes(box)
            axes.imshow(picture, cmap="gray", vmin=value_range[0], vmax=value_range[1], interpolation="nearest")
            axes.set_axis_off()
            if i == 0 and j < len(columns):
                axes.set_title(columns[j], fontsize=9, pad=3)

    canvas.draw()
    try:
        with replacing(path) as file:
            canvas.print_png(file)
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written: {error.strerror or error}") from error
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
