"""What `latents.json` says of an autoencoder; `dataset/volumes/latent_record.py` reads, compares and writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from AutoEncoder.checkpoint import latent_fingerprint
from AutoEncoder.latents import codebook_range
from common.errors import UserError


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
