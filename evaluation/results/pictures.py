"""Pictures that compare whole volumes: real beside reconstructed beside generated."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from common.errors import UserError
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid


def save_comparison(
    path: str | Path,
    rows: Sequence[tuple[str, Sequence[Tensor]]],
    *,
    planes: Sequence[str] = PLANES,
    columns: Sequence[str] | None = None,
    title: str = "",
) -> np.ndarray:
    """One row per label, in it the central slices of every volume, as a PNG. Returns the picture (height, width, 3).

    rows: (label, volumes), each volume (D, H, W) or (1, D, H, W) in [-1, 1].
    planes: which of "axial", "coronal", "sagittal" to draw of each volume, in this order.
    columns: a heading per slice; None writes the plane's name above each.
    """
    unknown = [plane for plane in planes if plane not in PLANES]
    if unknown or not planes:
        raise UserError(f"slices can be drawn in the planes {', '.join(PLANES)}, got {', '.join(planes) or 'none'}")
    cells = [(label, [central_slices(v)[plane] for v in volumes for plane in planes]) for label, volumes in rows]
    if columns is None:
        columns = list(planes) * max((len(volumes) for _, volumes in rows), default=0)
    return save_slice_grid(path, cells, columns=columns, title=title)
