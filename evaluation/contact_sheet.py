"""A picture of what a folder of generated volumes holds: OUT/seed_S/contact_sheet.png, one row for each volume.

Central axial, coronal and sagittal slices, at most 8 volumes of each class and size. Grey values cover the range of the
class (its window in HU, [0, 1] or [-1, 1]) and voxels have their size in mm, so that sheets can be compared.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config.errors import UserError
from dataset.intensity import MODEL_RANGE, to_model_range
from dataset.pictures import PLANES, central_slices, save_slice_grid
from dataset.volume_io import read_volume
from evaluation.volume_record import read_record
from train.logger import get_logger

SHEET_NAME = "contact_sheet.png"
MOST_OF_A_KIND = 8  # rows of a class and size
MOST_ROWS = 160  # about as high as picture viewers can take


def update_contact_sheet(folder: Path) -> Path | None:
    """Draws the sheet of a folder unless it is newer than every volume; None for a folder without volumes.

    Volumes without a sound record, and those that can't be read or hold other values than it says, are left out with a
    warning: they are not of this program's making.
    """
    sheet = folder / SHEET_NAME
    kinds = _volumes_by_kind(folder)
    volumes = [path for paths in kinds for path in paths]
    if not volumes:
        return None
    if sheet.is_file() and sheet.stat().st_mtime_ns > max(path.stat().st_mtime_ns for path in volumes):
        return sheet
    chosen = [(path, paths) for paths in kinds for path in paths[:MOST_OF_A_KIND]]
    rows = [(_label(path, paths), slices) for path, paths in chosen[:MOST_ROWS] if (slices := _slices(path))]
    if not rows:
        return None
    title = f"{folder.name}: {len(rows)} of {len(volumes)} volumes"
    save_slice_grid(sheet, rows, columns=PLANES, title=title)
    return sheet


def _volumes_by_kind(folder: Path) -> list[list[Path]]:
    """The volumes with a record, in lists of one class and size, all sorted by class id, size and number."""
    kinds: dict[tuple[Any, ...], list[tuple[int, Path]]] = {}
    for path in sorted(folder.glob("*.nii.gz")):
        record = read_record(path) or {}
        if _is_sound(record):
            kind = (record["class_id"], record["class_name"], *record["voxels"])
            kinds.setdefault(kind, []).append((record["sample"], path))
    return [[path for _, path in sorted(kinds[kind])] for kind in sorted(kinds)]


def _label(path: Path, paths: Sequence[Path]) -> str:
    name = path.name.removesuffix(".nii.gz")
    if path == paths[0] and len(paths) > MOST_OF_A_KIND:
        return f"{name}\n({MOST_OF_A_KIND} of {len(paths)})"
    return name


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether it has what the sheet needs: of this program it has, but anything may lie in the folder."""
    kinds = {"class_id": int, "class_name": str, "sample": int, "voxels": list}
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return False
    intensity = record.get("intensity") or {"low": MODEL_RANGE[0], "high": MODEL_RANGE[1]}
    if not isinstance(intensity, dict) or not all(isinstance(side, int) for side in record["voxels"]):
        return False
    low, high = intensity.get("low"), intensity.get("high")
    return isinstance(low, int | float) and isinstance(high, int | float) and low < high


def _slices(path: Path) -> list[np.ndarray]:
    """The three slices; none, with a warning, for a volume that can't be drawn."""
    record = read_record(path) or {}
    intensity = record.get("intensity") or {"low": MODEL_RANGE[0], "high": MODEL_RANGE[1]}
    try:
        volume = read_volume(path)
        data = to_model_range(volume.data, (intensity["low"], intensity["high"]), path)
    except UserError as error:
        get_logger().warning("%s leaves out a volume: %s", SHEET_NAME, error)
        return []
    pictures = central_slices(data, volume.header.spacing_mm)
    return [pictures[plane] for plane in PLANES]
