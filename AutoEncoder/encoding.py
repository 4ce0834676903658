"""Volume -> normalised latent: what the diffusion model learns, and the counterpart of `decoding.py`."""

import torch
from torch import Tensor

from AutoEncoder.latents import normalise_latents
from AutoEncoder.model.autoencoder import Autoencoder

RANGE_TOLERANCE = 1e-3  # of the range [-1, 1]: what rounding and resampling add


@torch.inference_mode()
def encode(autoencoder: Autoencoder, volume: Tensor, sliding_window: int | None = None) -> Tensor:
    """Normalised latent of a volume, or of volumes of one size, on the autoencoder's device.

    (1, D, H, W) -> (E, d, h, w), or (B, 1, D, H, W) -> (B, E, d, h, w); D = z, H = x, W = y.

    Args:
        volume: intensities in [-1, 1]. What does not divide into patches is padded with background at the far ends,
            and the latent is that of the padded volume.
        sliding_window: patches of each volume that are encoded at a time; None: by the memory that is free.

    Raises:
        ValueError: other axes or intensities, e.g. a NIfTI file's own array (X, Y, Z).
    """
    if volume.ndim not in (4, 5) or volume.shape[-4] != 1:
        raise ValueError(
            f"got an array {tuple(volume.shape)}, expected (1, D, H, W) or (B, 1, D, H, W) with D = z, H = x, W = y: "
            "read files with read_model_volume, which turns their axes X, Y, Z"
        )
    low, high = volume.min().item(), volume.max().item()
    if not (-1 - RANGE_TOLERANCE <= low and high <= 1 + RANGE_TOLERANCE):  # also NaN
        raise ValueError(f"got intensities {low:g} to {high:g}, expected [-1, 1]: read files with read_model_volume")
    batch = volume if volume.ndim == 5 else volume[None]
    batch = batch.to(autoencoder.codebook.embeddings.device, torch.float32)
    raw = autoencoder.patch_encode_sliding(batch, sliding_window=sliding_window)  # (B, E, d, h, w)
    latents = normalise_latents(raw, autoencoder.codebook.embeddings)
    return latents if volume.ndim == 5 else latents[0]
