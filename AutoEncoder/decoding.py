"""Normalised latent -> volume: whole, in blended tiles or in the official tiles, within the memory that there is.

| decoding | how | borders |
|---|---|---|
| exact | the whole latent, as in one pass; block by block where it doesn't fit (`exact_decoding.py`) | none |
| blended | overlapping tiles, each decoded as a volume of its own, averaged with Gaussian weights | smoothed |
| tiles | tiles that meet without overlap, as the official release decodes large volumes | seams |

None of them depends on how much memory there is: that only decides how large the blocks are in which a volume or a
tile is computed.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from AutoEncoder.exact_decoding import activation_bytes, plan_blocks
from AutoEncoder.latents import denormalise_latents
from AutoEncoder.model.autoencoder import Autoencoder
from common.errors import UserError
from common.memory import free_memory
from common.precision import autocast

OVERLAP = 0.25  # of neighbouring blended tiles, as a share of their edge


@torch.inference_mode()
def decode(
    autoencoder: Autoencoder,
    latent: Tensor,
    decoding: str = "exact",
    tile: int | None = None,
    max_bytes: int | None = None,
    precision: str = "32",
) -> Tensor:
    """Normalised latent (C, d, h, w) -> volume (1, D, H, W) float32 in [-1, 1] (NaN if it overflowed), on the CPU.

    Args:
        decoding: "exact", "blended" or "tiles".
        tile: edge of a tile in image voxels; "exact" has none.
        max_bytes: memory for activations; None: what is free.
        precision: "32", "bf16" or "16"; the codes are chosen in float32 whatever it is.

    Raises:
        UserError: `max_bytes` is too little.
    """
    raw = denormalise_latents(latent[None], autoencoder.codebook.embeddings)  # (1, C, d, h, w)
    whole = partial(autoencoder.decode, quantize=True, max_bytes=max_bytes)
    try:
        with autocast(latent.device, precision):
            if decoding == "exact":
                volume = whole(raw)  # (1, 1, D, H, W)
            elif decoding == "blended":
                edges = [min(tile // autoencoder.downsample_factor, extent) for extent in raw.shape[2:]]
                from monai.inferers import sliding_window_inference  # importing monai sets an environment variable

                volume = sliding_window_inference(
                    raw, edges, 1, lambda part: whole(part).float().cpu(), OVERLAP, mode="gaussian", device="cpu"
                )
            else:
                volume = autoencoder.decode_sliding(raw, quantize=True, patch_size=tile, max_bytes=max_bytes)
    except ValueError as error:  # the smallest blocks don't fit
        raise _too_little(error) from error
    volume = volume[0].float()
    return volume.masked_fill(volume.isinf(), torch.nan).clamp(-1, 1).cpu()  # clamping alone would hide an overflow


def check_memory(
    autoencoder: Autoencoder,
    grid: Sequence[int],
    tile: int | None,
    device: torch.device,
    max_bytes: int | None = None,
    precision: str = "32",
    where: str = "",
) -> None:
    """UserError, which begins with `where`, if `max_bytes` is too little to decode latents of `grid`; as `decode`."""
    limit = free_memory(device) if max_bytes is None else max_bytes
    with autocast(device, precision):
        element_bytes = activation_bytes(autoencoder.codebook.embeddings)
    cells = max(grid) if tile is None else tile // autoencoder.downsample_factor
    shape = (1, autoencoder.embedding_dim, *(min(cells, extent) for extent in grid))
    try:
        plan_blocks(autoencoder.decoder, shape, element_bytes, limit)
    except ValueError as error:
        raise _too_little(error, where) from error


def _too_little(error: ValueError, where: str = "") -> UserError:
    return UserError(f"{where}{error}: raise max_memory, or take decoding=blended with a smaller tile")
