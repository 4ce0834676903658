"""`latents.json`: which autoencoder made the latents of a folder, and how.

Latents of two autoencoders look alike, and a diffusion model trained on a mixture of them, or decoded by the other one,
gives noise. So the record is written before the first latent, and checked before more are added.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from AutoEncoder.checkpoint import latent_fingerprint
from AutoEncoder.latents import codebook_range
from common.errors import UserError
from common.files import write_atomically
from dataset.Singleres_dataset import RECORD_NAME, read_latent_record
from dataset.volumes.index import VOLUME_SUFFIX

AGAIN = "or move the folder away and encode again"


def make_record(autoencoder: nn.Module, checkpoint: str | Path, intensity_range: Sequence[float]) -> dict[str, Any]:
    """What a folder of this autoencoder's latents records.

    intensity_range: range of the files on disk that was mapped to [-1, 1].
    Raises UserError for an autoencoder whose codebook spans no range.
    """
    try:
        low, high = codebook_range(autoencoder.codebook.embeddings)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    return {
        "autoencoder": latent_fingerprint(autoencoder),
        "checkpoint": Path(checkpoint).name,
        "downsample": autoencoder.downsample_factor,
        "embedding_dim": autoencoder.embedding_dim,
        "codebook_min": low.item(),
        "codebook_max": high.item(),
        "patch_size": autoencoder.patch_size,
        "intensity_range": [float(value) for value in intensity_range],
    }


def start_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record into a new folder of latents, or checks that of an old one. Half files of a killed run go.

    The checkpoint's file name is not compared: both training stages of an autoencoder give the same latents.
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

    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)
    if found is None:
        write_atomically(folder / RECORD_NAME, (json.dumps(record, indent=2) + "\n").encode())
