"""view.html: volumes of a folder beside each other, to be sliced and turned in a browser by niivue.

A browser lets a page from a disk read no other file, and whoever copies a page forgets what lies beside it. So the
program and the volumes are in the page, the volumes with at most 128 voxels a side and 256 grey values, as many as fit
into 30 MB; the page names the whole files, and says what is smaller and what is left out.
"""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import from_matvec
from torch.nn import functional as F

from common.errors import UserError
from common.files import write_atomically
from common.log import get_logger
from common.text import printable
from dataset.volumes.geometry import size_text
from dataset.volumes.gzip_files import compress
from dataset.volumes.volume_io import Volume, read_volume, tensor_to_nifti
from evaluation.report_page.page import rendered
from evaluation.results.results import Beside, Panel

VIEW_NAME = "view.html"
NIIVUE = Path(__file__).with_name("vendored") / "niivue.umd.js"
MOST_SIDE = 128  # voxels
MOST_BYTES = 30e6  # of the page


def write_view(path: Path, entries: Sequence[Beside], title: str, folder: Path | None = None) -> None:
    """Writes the page of what can be chosen, in this order. Files that can't be read are left out, and named there.

    folder: that files are relative to; None: that of the page.
    """
    program = NIIVUE.read_text(encoding="utf-8")
    room, chosen, left_out = MOST_BYTES - len(program), [], []
    for number, entry in enumerate(entries):
        try:
            panels = [_panel(shown, folder or path.parent) for shown in entry.volumes]
        except UserError as error:
            left_out.append((entry.name, printable(str(error))))
            continue
        room -= sum(len(panel["data"]) for panel in panels)
        if room < 0:
            first = f"{len(entries) - number} of {len(entries)}, from {printable(entry.name)} on"
            left_out.append((first, f"a page has {MOST_BYTES / 1e6:.0f} MB at most"))
            break
        chosen.append({"name": printable(entry.name), "panels": panels})
    text = rendered("view.html", title=title, entries=chosen, left_out=left_out, program=program)
    write_atomically(path, text.encode(errors="replace"))
    get_logger().info("wrote %s: %d of %d in it", path, len(chosen), len(entries))


def _panel(shown: Panel, folder: Path) -> dict[str, Any]:
    """What the page has of a volume: `data` is a NIfTI file in base64. Labels stay the numbers that they are."""
    volume = read_volume(folder / shown.file)
    low, high = shown.value_range or (volume.data.min().item(), volume.data.max().item())
    is_whole = shown.value_range is None and bool((volume.data == volume.data.round()).all())
    is_labels = is_whole and 0 <= low and high <= 255
    slope, intercept = (1.0, 0.0) if is_labels else ((high - low or 1.0) / 255, low)
    data, affine = _reduced(volume, "nearest-exact" if is_labels else "area")
    codes = tensor_to_nifti(((data[0] - intercept) / slope).round().clamp(0, 255).to(torch.uint8).numpy())
    image = nib.Nifti1Image(codes, affine)
    image.header.set_slope_inter(slope, intercept)
    note = size_text(volume.header.shape)
    if codes.shape != volume.header.shape:
        note += f", here {size_text(codes.shape)}"
    embedded = b64encode(compress(image.to_bytes())).decode()
    return {"role": shown.role, "file": printable(shown.file), "note": note, "range": [low, high], "data": embedded}


def _reduced(volume: Volume, mode: str) -> tuple[torch.Tensor, np.ndarray]:
    """(1, D, H, W) of a volume, with at most `MOST_SIDE` voxels a side, and its affine."""
    shape = np.array(volume.data.shape[1:])
    new_shape = np.maximum(1, np.round(shape * min(1.0, MOST_SIDE / shape.max()))).astype(int)
    data = F.interpolate(volume.data[None], tuple(new_shape.tolist()), mode=mode)[0]
    scale = np.array(volume.header.shape) / tensor_to_nifti(data[0]).shape  # of x, y, z
    return data, volume.affine @ from_matvec(np.diag(scale), (scale - 1) / 2)
