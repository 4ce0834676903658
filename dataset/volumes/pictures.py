"""Slices of volumes as a labelled grid in one PNG, drawn off screen.

Axes of a volume: D = z, H = x, W = y (see dataset/volumes/volume_io.py).
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from common.errors import UserError
from common.files import replacing
from common.text import printable

PLANES = ("axial", "coronal", "sagittal")
LETTER_INCHES, LINE_INCHES = 0.08, 0.15  # of text of 9 points, about
MOST_LABEL_INCHES = 1.92  # of a label before a row, which is wrapped
COLOURS, SCALE_INCHES = "inferno", 0.6  # of coloured cells, and height of their scale below the picture


@dataclass(frozen=True)
class Coloured:
    """Cells from a column on that are no grey values, such as differences: drawn in colours, their scale below.

    value_range: values at both ends of the scale; higher ones are clipped. label: what the values are.
    """

    first_column: int
    value_range: tuple[float, float]
    label: str


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
    labels_above: bool = False,  # each above its row instead of before it
    coloured: Coloured | None = None,
) -> np.ndarray:
    """Draws labelled rows of pictures, writes them as a PNG, and returns what was drawn.

    rows: (label, pictures), each picture an array (rows, columns) as `central_slices` gives; rows may differ in length.
    Returns uint8 (height, width, 3), the same picture for a logger. The file is written beside and renamed.
    """
    if not rows or not any(len(pictures) for _, pictures in rows):
        raise UserError(f"{path}: there are no slices to draw")
    num_columns = max(len(pictures) for _, pictures in rows)
    grid_inches = cell_inches * num_columns
    labels = [_wrapped(label, grid_inches if labels_above else MOST_LABEL_INCHES) for label, _ in rows]
    headings = [_wrapped(heading, cell_inches) for heading in columns[:num_columns]]
    label_inches = 0.0 if labels_above else 0.3 + LETTER_INCHES * max(len(x) for of in labels for x in of.split("\n"))
    title = _wrapped(title, label_inches + grid_inches)
    head_inches = _text_inches(title) + max(map(_text_inches, headings), default=0)
    row_inches = [cell_inches + (_text_inches(label) if labels_above else 0) for label in labels]
    width = label_inches + grid_inches
    height = head_inches + sum(row_inches) + SCALE_INCHES * (coloured is not None)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    canvas = FigureCanvasAgg(figure)  # by hand, so that no global matplotlib state is touched

    def write(left: float, top: float, text: str, **how) -> None:
        figure.text(left / width, 1 - top / height, text, **{"fontsize": 9, "parse_math": False, "va": "top", **how})

    write(width / 2, 0.1, title, ha="center", fontsize=10)
    for j, heading in enumerate(headings):
        write(label_inches + (j + 0.48) * cell_inches, head_inches - 0.05, heading, ha="center", va="bottom")
    bottom = head_inches
    for label, (_, pictures), inches in zip(labels, rows, row_inches, strict=True):
        if labels_above:
            write(0.03, bottom + 0.06, label)
        else:
            write(0.1, bottom + cell_inches / 2, label, va="center")
        bottom += inches
        for j, picture in enumerate(pictures):
            left = label_inches + j * cell_inches
            box = (left / width, 1 - bottom / height, 0.96 * cell_inches / width, 0.96 * cell_inches / height)
            axes = figure.add_axes(box)
            is_coloured = coloured is not None and j >= coloured.first_column
            low, high = coloured.value_range if is_coloured else value_range
            colours = COLOURS if is_coloured else "gray"
            axes.imshow(picture, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            axes.set_axis_off()
    if coloured is not None:
        left, right = (label_inches + j * cell_inches for j in (coloured.first_column, num_columns - 0.04))
        bar = figure.add_axes((left / width, 0.36 / height, (right - left) / width, 0.12 / height))
        values = ScalarMappable(Normalize(*coloured.value_range), COLOURS)
        figure.colorbar(values, cax=bar, orientation="horizontal", extend="max")
        bar.tick_params(labelsize=8)
        bar.set_xlabel(coloured.label, fontsize=9, labelpad=1)

    canvas.draw()
    try:
        with replacing(path) as file:
            canvas.print_png(file)
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be written: {error.strerror or error}") from error
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def png_of(figure: Figure) -> bytes:
    """A figure as a PNG file, without touching matplotlib's global state."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _wrapped(text: str, inches: float) -> str:
    """Lines that fit into so many inches."""
    letters = int(inches / LETTER_INCHES)
    lines = [part for line in printable(text).split("\n") for part in textwrap.wrap(line, letters) or [""]]
    return "\n".join(lines)


def _text_inches(text: str) -> float:
    """Height of lines of text with room around them; 0 without."""
    return 0.12 + LINE_INCHES * (text.count("\n") + 1) if text else 0
