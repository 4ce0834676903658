"""Masks of the demo: the lungs of chests, by thresholds that hold for phantoms, and where a volume has them."""

import json
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from dataset.order.data_split import HELD_OUT, class_name_of, find_split
from dataset.preparation.classes import VOLUMES_JSON
from dataset.volumes.index import class_folder, is_size_folder, latent_folder, list_volumes, read_class_folders
from dataset.volumes.intensity import MODEL_RANGE
from dataset.volumes.volume_io import read_header, read_model_volume, write_volume
from evaluation.demonstration.stages import DemoPaths

CHEST, HINT, WHOLE = 0, "lungs", 64  # class id; name of the hint; voxels of a whole chest from top to bottom
BODY, AIR = -0.6, -0.45  # in [-1, 1]: the body is brighter, lungs within it darker
SHIFT = 5  # voxels that masks are moved by towards the head, as far as lungs of phantoms differ


def lungs(volume: Tensor) -> Tensor:
    """(1, D, H, W) in [-1, 1] -> 1 where the lungs are, else 0, (1, D, H, W) float32."""
    data = volume[0].numpy()
    body = np.stack([ndimage.binary_fill_holes(axial > BODY) for axial in data])
    body = ndimage.binary_erosion(body, np.ones((1, 5, 5)))
    found = ndimage.binary_opening(body & (data < AIR), iterations=1)
    return torch.from_numpy(found)[None].float()


def dice(first: Tensor, second: Tensor) -> float:
    """Overlap of two masks, 2 |A ∩ B| / (|A| + |B|)."""
    return (2 * (first * second).sum() / (first.sum() + second.sum()).clamp(min=1)).item()


def moved(mask: Tensor) -> Tensor:
    """A mask (1, D, H, W) `SHIFT` voxels nearer to the head."""
    return F.pad(mask[:, :-SHIFT], (0, 0, 0, 0, SHIFT, 0))


def height(mask: Tensor) -> float:
    """Of its centre, in voxels."""
    depths = torch.arange(mask.shape[1])[:, None, None]
    return ((mask[0] * depths).sum() / mask.sum().clamp(min=1)).item()


def write_masks(demo: DemoPaths, output: Path) -> None:
    """Masks of all chests in output/CTChest/SIZE, moved ones of whole held-out ones in output/moved, and JSONs."""
    volumes_json = demo.phantoms / VOLUMES_JSON
    split = find_split(volumes_json)
    entries: dict[str, list[str]] = {kind: [] for kind in ("images", "latents", "masks", "moved", "whole")}
    for place in read_class_folders(volumes_json)[CHEST]:
        place = place.resolve()
        name = Path(class_folder(place).name) / (place.name if is_size_folder(place.name) else "")
        target, target_moved = output / name, output / "moved" / name
        split.write(target, class_name_of(place))
        is_whole = read_header(list_volumes(place)[0]).tensor_shape[0] == WHOLE
        held_out = set(split.select(place, HELD_OUT)) if is_whole else set()
        for path in list_volumes(place):
            wanted = [(target, lungs)]
            wanted += [(target_moved, lambda volume: moved(lungs(volume)))] if path in held_out else []
            for folder, make in wanted:
                file = folder / path.relative_to(place)
                if not file.is_file():
                    volume = read_model_volume(path, MODEL_RANGE)
                    write_volume(file, make(volume.data), volume)
        of_place = {"images": place, "latents": latent_folder(place), "masks": target}
        of_place |= {"moved": target_moved, "whole": place} if is_whole else {}
        for kind, folder in of_place.items():
            entries[kind].append(str(folder))
    label = str(CHEST)
    contents = {
        "latents.json": {label: {"images": entries["latents"], "hints": {HINT: entries["masks"]}}},
        "conditions.json": {label: {"images": entries["images"], "hints": {HINT: entries["masks"]}}},
        "moved.json": {label: {"images": entries["whole"], "hints": {HINT: entries["moved"]}}},
    }
    for file, content in contents.items():
        (output / file).write_text(json.dumps(content, indent=2) + "\n")
