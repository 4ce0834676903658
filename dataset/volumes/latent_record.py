"""`latents.json` in a folder of latents: which autoencoder made them, and how.

Latents of two autoencoders look alike, and a diffusion model trained on a mixture of them, or decoded by the other one,
gives noise. So the record is written before the first latent, and checked before more are added.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.documents import read_json
from common.errors import UserError
from common.files import remove_leftovers, write_atomically
from common.places import is_file
from dataset.volumes.index import VOLUME_SUFFIX

RECORD_NAME = "latents.json"
AGAIN = "or move the folder away and encode again"


def read_latent_record(folder: str | Path) -> dict[str, Any] | None:
    """The parsed `latents.json` of a folder, or None. UserError if it is no JSON object."""
    path = Path(folder) / RECORD_NAME
    if not is_file(path):
        return None
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): move the folder away and make the latents again") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}: a JSON object is needed, found a {type(record).__name__}: make the latents again")
    return record


def start_folder(folder: Path, record: Mapping[str, Any], tidy: bool = True) -> None:
    """Writes the record into a new folder of latents, or checks that of an old one.

    The checkpoint's file name is not compared: both training stages of an autoencoder give the same latents.
    tidy: half files of a killed run go, so nobody else may be writing.
    Raises UserError for latents of another autoencoder, range or patch size, or of unknown origin.
    """
    found = read_latent_record(folder)
    if found is None:
        if next(folder.rglob(f"*{VOLUME_SUFFIX}"), None) is not None:
            raise UserError(
                f"{folder}: has latents but no {RECORD_NAME}, so it is not known which autoencoder made them: "
                "move the folder away and encode again"
            )
    elif found.get("autoencoder") != record["autoencoder"]:
        raise UserError(
            f"{folder}: holds latents of another autoencoder ({found.get('checkpoint')}) than {record['checkpoint']}: "
            f"give the autoencoder that made them, {AGAIN}"
        )
    else:
        for name in ("patch_size", "intensity_range"):
            if found.get(name, record[name]) != record[name]:
                raise UserError(
                    f"{folder}: holds latents made with {name} {found[name]}, not {record[name]}: "
                    f"give the same value, {AGAIN}"
                )

    if tidy:
        remove_leftovers(folder)
    if found is None:
        write_atomically(folder / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
