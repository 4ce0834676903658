"""What shows a folder of generated volumes: OUT/seed_S/contact_sheet.png, one row for each volume, and view.html.

Central axial, coronal and sagittal slices, at most 8 volumes of each class and size. Grey values cover the range of the
class (its window in HU, [0, 1] or [-1, 1]) and voxels have their size in mm, so that sheets can be compared. The page
(`evaluation/report_page/view.py`) has the first volume of each class and size first, then the second ones.
"""

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.log import get_logger
from dataset.volumes.intensity import MODEL_RANGE, to_model_range
from dataset.volumes.pictures import PLANES, central_slices, save_slice_grid, with_square_pixels
from dataset.volumes.volume_io import int16_read_back, read_volume
from evaluation.generation.record import read_record
from evaluation.generation.requests import Request
from evaluation.report_page.view import VIEW_NAME, write_view
from evaluation.results.results import Beside, Panel

SHEET_NAME = "contact_sheet.png"
MOST_OF_A_KIND = 8  # rows of a class and size
MOST_ROWS = 160  # about as high as picture viewers can take

Slices = dict[Path, list[np.ndarray]]  # of a volume's file its slices by plane, in [-1, 1]


@dataclass(frozen=True)
class Shown:
    """A volume that can be drawn, and what its record says of it."""

    path: Path
    kind: tuple[Any, ...]  # class id and name, voxels
    sample: int
    value_range: tuple[float, float]  # drawn black and white


def keep_slices(made: Slices, request: Request, values: Tensor, dtype: str) -> None:
    """Keeps what a sheet shows of a volume that was just written, so that its file need not be read.

    Only of volumes that a sheet can show, and no more than the rows of one sheet: the rest is read.
    values: (1, D, H, W) in the units of the request, as they were given to `write_volume` with this type.
    """
    if request.sample >= MOST_OF_A_KIND or len(made) >= MOST_ROWS:
        return
    slices = central_slices(values)
    for plane, picture in slices.items():
        if dtype == "int16":
            picture = int16_read_back(picture, request.intensity_range, request.is_hounsfield)
        picture = torch.from_numpy(np.ascontiguousarray(picture))
        slices[plane] = to_model_range(picture, request.intensity_range, request.path).numpy()
    spacing_mm = np.float32(request.spacing_mm).tolist()  # as a header holds it
    made[request.path] = list(with_square_pixels(slices, spacing_mm).values())


def update_view(folder: Path) -> None:
    """Makes the page of a folder with volumes unless it is newer than all of them."""
    volumes = _volumes(folder)
    if not volumes or _is_newer(folder / VIEW_NAME, volumes):
        return
    entries = []
    for shown in sorted(volumes, key=lambda shown: (shown.sample, shown.kind, shown.path)):
        name = shown.path.name.removesuffix(".nii.gz")
        entries.append(Beside(name, [Panel("generated", shown.path.name, shown.value_range)]))
    write_view(folder / VIEW_NAME, entries, folder.name)


def update_contact_sheet(folder: Path, made: Slices) -> Path | None:
    """Draws the sheet of a folder unless it is newer than every volume; None for a folder without volumes.

    made: what `keep_slices` kept of volumes that this process has written; others are read from their files.
    Volumes without a sound record, and those that can't be read or hold other values than it says, are left out with a
    warning: they are not of this program's making.
    """
    sheet = folder / SHEET_NAME
    volumes = _volumes(folder)
    if not volumes:
        return None
    if _is_newer(sheet, volumes):
        return sheet
    volumes.sort(key=lambda shown: (shown.kind, shown.sample, shown.path))
    chosen: list[tuple[Shown, str]] = []
    for _, group in groupby(volumes, key=lambda shown: shown.kind):
        same = list(group)
        labels = [shown.path.name.removesuffix(".nii.gz") for shown in same[:MOST_OF_A_KIND]]
        if len(same) > MOST_OF_A_KIND:
            labels[0] += f"\n({MOST_OF_A_KIND} of {len(same)})"
        chosen += zip(same, labels, strict=False)
    rows = [(label, slices) for shown, label in chosen[:MOST_ROWS] if (slices := _slices(shown, made))]
    if not rows:
        return None
    save_slice_grid(sheet, rows, columns=PLANES, title=f"{folder.name}: {len(rows)} of {len(volumes)} volumes")
    return sheet


def _volumes(folder: Path) -> list[Shown]:
    return [shown for path in folder.glob("*.nii.gz") if (shown := _described(path))]


def _is_newer(file: Path, volumes: list[Shown]) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > max(shown.path.stat().st_mtime_ns for shown in volumes)


def _described(path: Path) -> Shown | None:
    """None without a record that has what the sheet needs: of this program it has, but anything may lie there."""
    record = read_record(path) or {}
    kinds = {"class_id": int, "class_name": str, "sample": int, "voxels": list}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return None
    intensity = record.get("intensity") or {"low": MODEL_RANGE[0], "high": MODEL_RANGE[1]}
    if not isinstance(intensity, dict) or not all(isinstance(side, int) for side in record["voxels"]):
        return None
    low, high = intensity.get("low"), intensity.get("high")
    if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
        return None
    return Shown(path, (record["class_id"], record["class_name"], *record["voxels"]), record["sample"], (low, high))


def _slices(shown: Shown, made: Slices) -> list[np.ndarray]:
    """The three slices; none, with a warning, for a volume that can't be drawn."""
    if shown.path in made:
        return made[shown.path]
    try:
        volume = read_volume(shown.path)
        data = to_model_range(volume.data, shown.value_range, shown.path)
    except UserError as error:
        get_logger().warning("%s leaves out a volume: %s", SHEET_NAME, error)
        return []
    return list(central_slices(data, volume.header.spacing_mm).values())
